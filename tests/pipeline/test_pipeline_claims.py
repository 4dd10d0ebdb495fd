"""What the report's first line may claim: speed-up, stopping early, errors and intervals, each worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.claims import PROBES, contrasts, headline, interval, standard_error

Pair = tuple[float | None, float | None]
"""kNN and linear probe."""


def comparison(stopped: Pair, cached: Pair, ratio: float = 1.25) -> dict[str, Any]:
    """A comparison on 10,000 images: one standard error of one half is half a point, of a difference 0.71."""
    end = dict(zip(PROBES, cached, strict=True))
    return {
        "speedup_total": ratio,
        "arms": {
            "e2e": {"total_seconds": 50.0},
            "cached": {"total_seconds": 40.0, "curve": [{"probe_images": 10_000}]} | end,
        },
        "early_stop": dict(zip(PROBES, stopped, strict=True)),
    }


@pytest.mark.parametrize(
    ("stopped", "cached", "ends"),
    [
        ((0.50, 0.60), (0.49, 0.58), " – but end to end stopped after the same 40.0 s scores as well or better"),
        ((0.50, 0.60), (0.50, 0.60), " – but end to end stopped after the same 40.0 s scores as well or better"),
        ((0.50, 0.60), (0.51, 0.60), " – but end to end stopped after the same 40.0 s scores as well, within error"),
        ((0.50, 0.60), (0.48, 0.65), " – but end to end stopped after the same 40.0 s scores better in kNN"),
        ((0.50, 0.60), (0.52, 0.60), ", and ahead of end to end stopped after the same 40.0 s in kNN"),
        ((0.50, 0.60), (0.52, 0.63), ", and ahead of end to end stopped after the same 40.0 s in kNN and linear probe"),
        ((None, None), (None, None), "; the images have no labels, so nobody knows which arm learned more"),
    ],
)
def test_the_first_line_tells_what_stopping_early_would_have_done(stopped: Pair, cached: Pair, ends: str) -> None:
    found = comparison(stopped, cached)
    assert headline(found) == "1.25× the speed of end to end, caches included" + ends


def test_a_loss_of_time_is_called_one() -> None:
    found = comparison((0.5, 0.5), (0.5, 0.5), ratio=0.8)
    found["arms"]["e2e"]["total_seconds"] = 32.0
    assert headline(found) == (
        "Slower: 0.80× the speed of end to end, caches included – but end to end, which was done before, scores as "
        "well or better"
    )


def test_the_error_of_a_difference() -> None:
    assert standard_error(0.5, 10_000) == 0.005
    (knn, _) = contrasts(comparison((0.5, 0.5), (0.52, 0.5)))
    assert knn.error == pytest.approx(1.96 * (0.5 * 0.5 + 0.52 * 0.48) ** 0.5 / 100) and knn.sure
    assert str(knn) == "kNN 50.0\N{NO-BREAK SPACE}% against 52.0\N{NO-BREAK SPACE}% (beyond error, ±1.4 points)"


def test_with_seeds_the_interval_is_theirs() -> None:
    # three values: t of 2 degrees of freedom at 97.5 % is 4.303
    assert interval([1.0, 2.0, 3.0]) == (2.0, pytest.approx(4.3027 / 3**0.5, rel=1e-4))
    seeds = [comparison((0.50, 0.60), (0.50 + gain, 0.60), 1.2 + gain) for gain in (0.006, 0.007, 0.008)]
    assert headline(seeds[0], seeds) == (
        "1.21× the speed of end to end, caches included (mean of 3 seeds, 95 % interval 1.20 to 1.21), and ahead of "
        "end to end stopped after the same 40.0 s in kNN"
    ), "0.7 points are within the error of one run and beyond that of three"
    assert headline(seeds[0], seeds[:2]).endswith("scores as well, within error")
