"""The figure of a study: its curves, and what must not lie on each other."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from pipeline.outcome import Line, Row
from pipeline.study_figure import mean_curve, study_figure


@pytest.mark.parametrize("scores", [("top1",), ("knn_top1", "linear_top1")])
def test_the_title_of_a_figure_stays_clear_of_its_legend(scores: tuple[str, ...]) -> None:
    means: dict[str, tuple[float, float | None]] = {score: (0.4, 0.01) for score in ("total_seconds", *scores)}
    named = [Line(f"frozen-6-three-heads-{number}", "", (0, 1, 2), means, {}, {}) for number in range(8)]
    for title in ("finetuning: What does freezing cost in fine-tuning?", "a study: " + "of words and more words " * 6):
        figure = study_figure(title, named, [])
        figure.draw_without_rendering()
        boxes = [part.get_window_extent() for part in (figure._suptitle, *figure.legends, *figure.axes)]
        assert len(boxes) == 2 + 2 * len(scores)
        assert not any(boxes[0].overlaps(other) for other in boxes[1:])
        assert boxes[0].x0 > 0 and boxes[0].x1 < figure.bbox.width and boxes[0].y1 < figure.bbox.height
        plt.close(figure)


def test_the_curve_of_seeds_is_their_mean_point_by_point() -> None:
    curves = [[{"epoch": s, "seconds": s + seed, "k": 0.1 * s + 0.01 * seed} for s in (1, 2, 3)] for seed in (0, 1, 2)]
    curves[0] = curves[0][:2]
    half = 4.3027 * 0.01 / 3**0.5
    assert mean_curve(curves, "k") == [
        (2.0, pytest.approx(0.11), pytest.approx(half, rel=1e-4)),
        (3.0, pytest.approx(0.21), pytest.approx(half, rel=1e-4)),
    ]
    assert mean_curve(curves[:1], "k") == [(1, 0.1, 0.0), (2, 0.2, 0.0)]


@pytest.mark.usefixtures("crowds")
@pytest.mark.parametrize(("lost", "at"), [(0.0, [30.0, 60.0]), (20.0, [1.0, 2.0])])
def test_curves_are_drawn_against_epochs_where_seconds_do_not_compare(lost: float, at: list[float]) -> None:
    rows = []
    for name, seconds in (("e2e", 40.0), ("cached", 30.0)):
        curve = tuple({"epoch": n, "seconds": n * seconds, "knn_top1": 0.2 + 0.01 * n} for n in (1.0, 2.0))
        values = {"total_seconds": 2 * seconds, "crowded_seconds": lost, "watched_seconds": 2 * seconds}
        rows.append(Row(name, 0, "done", values, curve))
    lines = [Line(row.variant, "", (0,), {"knn_top1": (0.22, None)}, {}, {}) for row in rows]
    figure = study_figure("a study", lines, rows)
    above = figure.axes[0]
    assert [list(line.get_xdata()) for line in above.lines][1] == at
    assert above.get_xlabel().startswith("epochs" if lost else "seconds")
    plt.close(figure)
