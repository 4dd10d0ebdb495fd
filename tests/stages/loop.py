"""An arm small enough to be trained in a moment: 32 images of 16 tokens, three blocks, four steps an epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.config import DecoderConfig, HeadSpec, MaskConfig, ModelConfig
from models.learner import Learner
from stages.arm import Arm, Hooks
from stages.checkpoint import Progress, read_state
from stages.config import DataConfig, ScheduleConfig, TrainConfig
from stages.images import ImageList
from stages.optim import Rates, build_optimizer, parameter_groups
from stages.probe import ProbeResult
from stages.segment import Segment
from stages.sources import LiveImages, Sampling
from stages.train import Build, build_model, train_arm

MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=3, heads=2)
HEADS = (HeadSpec(3, "pixels"),)
BUILD = Build(0, MODEL, DecoderConfig(depth=1, width=12, heads=3), HEADS)
TRAIN = TrainConfig(batch_size=8, precision="float32", device="cpu", threads=1, lr=1e-3, warmup_epochs=0.5)
STATE = "state.safetensors"


def parts(*cuts: int, entry: int = 0, epochs: int = 1) -> tuple[Segment, ...]:
    """A stage of parts of so many epochs of 4 steps, each with its own cut, behind a cache at `entry`."""
    found = [
        Segment(cut, epochs * i, epochs, 4 * epochs * i, 4 * epochs, 4, in_place=cut - entry, ends_stage=False)
        for i, cut in enumerate(cuts)
    ]
    return (*found[:-1], replace(found[-1], ends_stage=True))


def arm(folder: Path, images: ImageList, segments: tuple[Segment, ...], **changes: Any) -> Arm:
    train = replace(TRAIN, **{key: changes.pop(key) for key in list(changes) if hasattr(TRAIN, key)})
    rates = Rates(train, ScheduleConfig(), 3, sum(segment.steps for segment in segments), 4)
    source = LiveImages(images, Sampling(0, 8, DataConfig(), MODEL, MaskConfig(), HEADS))
    return replace(
        Arm(
            tag={"stage": 0},
            segments=segments,
            make=lambda part: build_model(BUILD, part.cut, "cpu", part.entry),
            optimizer=lambda model: build_optimizer(parameter_groups(model, train.weight_decay), train),
            train=train,
            rates=rates,
            source=lambda segment: source,
            state=folder / STATE,
            start=None,
            inputs="asked",
        ),
        **changes,
    )


def score(knn: float | None) -> ProbeResult:
    return ProbeResult(knn, knn, 0.1, 2.0, 40)


def hooks(stop: Callable[[], bool] = lambda: False, **changes: Any) -> Hooks:
    return replace(Hooks(lambda event: None, lambda model: score(0.5), stop), **changes)


class StopAfter:
    """False so many times, then True."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def assert_same(one: Learner, other: Learner) -> None:
    theirs = other.state_dict()
    assert theirs.keys() == one.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def plain(progress: Progress) -> tuple[object, ...]:
    """What of a progress does not depend on the clock."""
    totals = [(part.steps, part.images, part.loss_sum, part.first_loss) for part in progress.totals]
    curve = [(point["epoch"], point["knn_top1"]) for point in progress.curve]
    return progress.segment, progress.step, totals, curve, progress.checks, progress.ended


def stopped_and_resumed(make: Callable[[Path], Arm], folder: Path, stops: tuple[int, ...], **how: Any) -> None:
    """A run stopped after any of so many steps, and gone on with, is the straight run."""
    straight, model = train_arm(make(folder / "straight"), hooks(**how))
    want = read_state(folder / "straight" / STATE)
    for stop in stops:
        once = make(folder / f"stopped-{stop}")
        first, _ = train_arm(once, hooks(StopAfter(stop), **how))
        assert first.segment < len(once.segments), "it was stopped before its end"
        again, resumed = train_arm(once, hooks(**how))
        assert_same(model, resumed)
        assert plain(again) == plain(straight)
        found = read_state(folder / f"stopped-{stop}" / STATE)
        assert found[2].keys() == want[2].keys()
        assert all(torch.equal(value, found[2][name]) for name, value in want[2].items())


class Scores:
    """kNN by the epoch at which it is asked for, so that a resumed run is scored like a straight one."""

    def __init__(self, *values: float) -> None:
        self.values = values
        self.seen: dict[bytes, float] = {}

    def __call__(self, model: Any) -> ProbeResult:
        key = model.encoder.vit.blocks[2].mlp.fc1.weight.detach().numpy().tobytes()
        return score(self.seen.setdefault(key, self.values[len(self.seen) % len(self.values)]))
