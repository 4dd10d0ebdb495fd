"""Adaptive freezing in the loop: what is compared, when a stage ends by it, and that a stop in between is not seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.adaptive import Settle, relative_change
from stages.checkpoint import read_state
from stages.endings import PROBE, Settling
from stages.images import ImageList, open_images
from stages.train import build_model, train_arm
from stages.views import centre_batch
from tests.stages.loop import BUILD, STATE, TRAIN, StopAfter, arm, hooks, parts, score, stopped_and_resumed


@pytest.fixture(scope="module")
def images() -> ImageList:
    return open_images("sample").only(range(32))


def settling(images: ImageList, metric: str = "change", below: float = 1e9, every: float = 1.0) -> Settling:
    return Settling(Settle(metric, below, 2), 1, every, torch.from_numpy(centre_batch(images, range(5), 16)))  # type: ignore[arg-type]


def test_a_stage_ends_at_the_epoch_after_enough_settled_checks(tmp_path: Path, images: ImageList) -> None:
    events: list[dict[str, Any]] = []
    asked = arm(tmp_path, images, parts(0, epochs=5), settling=settling(images))
    progress, _ = train_arm(asked, hooks(log=events.append))
    assert progress.ended is not None and progress.ended["epoch"] == 2.0
    assert progress.ended["why"].startswith("blocks before 1 settled: change ")
    checks = [event for event in events if "settle_measure" in event]
    assert [{key: event[key] for key in event if key != "stage"} for event in checks] == progress.checks
    assert [(check["epoch"], check["settle_checks"]) for check in progress.checks] == [(1.0, 1), (2.0, 2)]
    assert all(0 < check["settle_measure"] < 1 and check["before_cut"] == 1 for check in progress.checks)
    assert [point["epoch"] for point in progress.curve] == [2.0], "the end is evaluated"
    assert PROBE not in read_state(tmp_path / STATE)[2], "the next stage begins with features of its own"


def test_the_measure_is_the_change_of_the_watched_blocks(tmp_path: Path, images: ImageList) -> None:
    """The first check compares the encoder after the first epoch with the one before the first step."""
    watched = settling(images, below=1e-9)
    first, _ = train_arm(arm(tmp_path, images, parts(0)), hooks())
    progress, _ = train_arm(arm(tmp_path / "a", images, parts(0, epochs=2), settling=watched), hooks(StopAfter(4)))
    state = read_state(tmp_path / "a" / STATE)[2]
    now = build_model(BUILD, 0, "cpu")
    weights = {name.removeprefix("encoder/"): v for name, v in state.items() if name.startswith("encoder/")}
    now.encoder.vit.load_state_dict(weights)
    before = build_model(BUILD, 0, "cpu").encoder
    a, b = (watched.features(one, TRAIN) for one in (now.encoder, before))
    assert a.shape == (5, 16, 24)
    epoch = read_state(tmp_path / "a" / STATE)[1].checks[0]
    assert progress.step == 5 and epoch["settle_measure"] > 0
    assert not torch.equal(a, state[PROBE]), "the fifth step came after the check"
    assert (state[PROBE] - b).norm() / b.norm() == pytest.approx(epoch["settle_measure"], rel=1e-5)
    assert first.checks == []


@pytest.mark.parametrize(("metric", "below"), [("change", 1e9), ("cka", 1e9), ("change", 1e-9)])
def test_an_adaptive_stage_resumes_and_decides_alike(
    tmp_path: Path, images: ImageList, metric: str, below: float
) -> None:
    stopped_and_resumed(
        lambda folder: arm(folder, images, parts(0, epochs=4), settling=settling(images, metric, below, every=0.5)),
        tmp_path,
        (0, 1, 2) if below > 1 else (3, 9, 14),
    )
    ended = read_state(tmp_path / "straight" / STATE)[1].ended
    assert (ended is not None) == (below > 1), "what does not settle takes all its epochs"


def test_fractions_of_an_epoch_are_checked_and_the_stage_ends_with_an_epoch(tmp_path: Path, images: ImageList) -> None:
    asked = arm(tmp_path, images, parts(0, epochs=4), settling=settling(images, every=0.75))
    progress, _ = train_arm(asked, hooks())
    assert [check["epoch"] for check in progress.checks] == [0.75, 1.5]
    assert progress.ended is not None and progress.ended["epoch"] == 2.0


def test_schedule_free_is_watched_by_its_averaged_weights(tmp_path: Path, images: ImageList) -> None:
    watched = settling(images, below=1e-9)
    seen: list[torch.Tensor] = []
    asked = arm(tmp_path, images, parts(0, epochs=2), settling=watched, lr_schedule="schedule_free", eval_every=1)
    how = hooks(evaluate=lambda model: seen.append(watched.features(model.encoder, TRAIN)) or score(0.5))
    progress, _ = train_arm(asked, how)
    assert relative_change(seen[1], seen[0]) == progress.checks[1]["settle_measure"]
    stopped_and_resumed(lambda folder: replace(asked, state=folder / STATE), tmp_path / "resume", (2, 5))
    zero, one = parts(0, 0)
    first = replace(asked, segments=(replace(zero, ends_stage=True),), settling=None)
    seen.clear()
    train_arm(replace(first, state=tmp_path / "zero" / STATE), how)
    later = replace(asked, tag={"stage": 1}, segments=(one,), start=tmp_path / "zero" / STATE)
    progress, _ = train_arm(replace(later, state=tmp_path / "one" / STATE), how)
    assert relative_change(seen[1], seen[0]) == progress.checks[0]["settle_measure"], "a stage's first check, too"


@pytest.mark.parametrize(("eval_every", "points"), [(1, [12.0, 13.0]), (0, [13.0])])
def test_checks_and_kept_encoders_take_training_time_beside_an_evaluation_too(
    tmp_path: Path, images: ImageList, eval_every: int, points: list[float]
) -> None:
    """A look takes 1 s, of which there is one at the start and one at each of two checks, keeping an encoder 10 s, an
    evaluation 100 s, all else nothing."""
    clock = [0.0]

    def takes(seconds: float) -> None:
        clock[0] += seconds

    class Slow(Settling):
        def features(self, *args: Any) -> torch.Tensor:
            takes(1.0)
            return super().features(*args)

    watched = Slow(**vars(settling(images, below=1e-9)))
    how = hooks(
        evaluate=lambda model: takes(100.0) or score(0.5),
        keep=lambda path, model: takes(10.0),
        now=lambda: clock[0],
    )
    kept = {1: tmp_path / "epoch-1"}
    asked = arm(tmp_path, images, parts(0, epochs=2), settling=watched, eval_every=eval_every, keep=kept)
    progress, _ = train_arm(asked, how)
    totals = progress.totals[0]
    assert (totals.train_seconds, totals.evaluate_seconds) == (13.0, 100.0 * len(points))
    assert [point["seconds"] for point in progress.curve] == points


def test_checks_are_counted_through_the_segments_of_a_stage(tmp_path: Path, images: ImageList) -> None:
    """As where a ring of views turns after every epoch, and blocks are looked at after every second."""
    turning, whole = (parts(0, 0, 0, 0), parts(0, epochs=4))
    found = []
    for name, segments in (("turning", turning), ("whole", whole)):
        asked = arm(tmp_path / name, images, segments, settling=settling(images, below=1e-9, every=2.0))
        found.append(train_arm(asked, hooks())[0].checks)
    assert [check["epoch"] for check in found[0]] == [2.0, 4.0] and found[0] == found[1]
    assert PROBE not in read_state(tmp_path / "turning" / STATE)[2], "the next stage begins with features of its own"


@pytest.mark.parametrize("every", [0.75, 1.0, 2.0])
def test_a_stage_of_several_segments_resumes_and_compares_alike(
    tmp_path: Path, images: ImageList, every: float
) -> None:
    """Stopped in a segment's middle, at its end, after the first check, and where the next segment would begin."""

    def make(folder: Path) -> Any:
        return arm(folder, images, parts(0, 0, 0, 0), settling=settling(images, below=1e-9, every=every))

    def dies(segment: Any) -> Any:
        assert not segment.first_epoch
        return made(segment)

    stopped_and_resumed(make, tmp_path, (1, 4, 9))
    asked = make(tmp_path / "killed")
    made = asked.make
    with pytest.raises(AssertionError):
        train_arm(replace(asked, make=dies), hooks())
    assert read_state(tmp_path / "killed" / STATE)[1].segment == 1
    assert train_arm(asked, hooks())[0].checks == read_state(tmp_path / "straight" / STATE)[1].checks
