"""Arms that several ranks train together and one process trains alone: tiny, and of every kind that ranks must not
change. Imported by the ranks, so nothing here is of pytest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.config import DecoderConfig, HeadSpec, MaskConfig
from models.drop import DepthDrop
from models.learner import Learner
from models.teacher import EmaTeacher
from pipeline.ranks import rank_here
from stages.adaptive import Settle
from stages.arm import Arm
from stages.config import DataConfig, FinetuneConfig
from stages.endings import Settling
from stages.finetune import FinetuneRates, Lessons, LiveViews, layer_decay_groups, loop_settings
from stages.images import ImageList, open_images
from stages.optim import build_adamw, parameter_groups
from stages.ranks import Ranks
from stages.sources import CachedFeatures, LiveImages, Sampling
from stages.team import RanksDiffer, Team
from stages.train import Build, build_model, train_arm
from tests.stages.loop import MODEL, TRAIN, StopAfter, arm, hooks, parts, score

DECODER = DecoderConfig(depth=1, width=12, heads=3)
PIXELS = HeadSpec(3, "pixels")
SEVERAL = (HeadSpec(1, "pixels", weight=0.5, weight_end=1.0), HeadSpec(2, "hog", scale=2.0, matching=False), PIXELS)
TAUGHT = (HeadSpec(2, "pixels"), HeadSpec(3, "teacher", teacher=3))


def masked(folder: Path, images: ImageList, heads: Any = (PIXELS,), cuts: Any = (0,), **changes: Any) -> Arm:
    """An arm of two epochs a cut, 4 steps of 8 images each."""
    segments = parts(*cuts, epochs=2)
    teacher = partial(EmaTeacher, momentum=0.9) if heads is TAUGHT else None
    drop = changes.pop("drop", None)
    stage_of = changes.setdefault("heads_of", lambda segment: 0)
    build = Build(0, MODEL, DECODER, heads, teacher, drop)
    mask = changes.pop("mask", MaskConfig())
    how = Sampling(0, 8, DataConfig(), MODEL, mask, heads, total_steps=20, averages=teacher is not None)
    source = LiveImages(images, how)
    found = arm(folder, images, segments, **changes)
    make = lambda part: build_model(build, part.cut, "cpu", part.entry, stage_of(part))  # noqa: E731
    return replace(found, make=make, source=lambda segment: source)


def plain_descent(model: Learner) -> torch.optim.Optimizer:
    """Gradient descent, which unlike AdamW sees how long a gradient is."""
    return torch.optim.SGD(parameter_groups(model, 0.0), lr=0.1)


def classified(folder: Path, images: ImageList, **settings: Any) -> Arm:
    """Fine-tuning of two epochs, 4 steps of 8 images each."""
    from tests.stages.test_stages_finetune import classifier

    config = FinetuneConfig(batch_size=8, epochs=2, drop_path=0.0, rand_augment=0.0, **settings)
    lessons = Lessons(0, config, DataConfig(), 16, 10)
    train = loop_settings(config, TRAIN)
    return replace(
        arm(folder, images, parts(0, epochs=2)),
        make=lambda part: classifier(blocks=(2,)),
        optimizer=lambda model: build_adamw(layer_decay_groups(model, 0.05, 0.75), train),
        source=lambda part: LiveViews(images, lessons),
        train=train,
        rates=FinetuneRates(config, 8, 4),
    )


ARMS: dict[str, Callable[[Path, ImageList], Arm]] = {
    "plain": masked,
    "descent, accumulated": partial(masked, optimizer=plain_descent, accumulate=2),
    "clipped descent": partial(masked, optimizer=plain_descent, clip=0.05),
    "several heads, a growing ratio": partial(masked, heads=SEVERAL, mask=MaskConfig(ratio=0.5, ratio_end=0.75)),
    "a moving average, frozen in place": partial(masked, heads=TAUGHT, cuts=(0, 1)),
    "depth dropped": partial(masked, drop=DepthDrop(0, 0.5, 0.8, 20), optimizer=plain_descent),
    "schedule-free": partial(masked, lr_schedule="schedule_free", cuts=(0, 2)),
    "new heads at a stage": partial(masked, cuts=(0, 1), heads_of=lambda segment: segment.cut),
    "fine-tuned, mixed": partial(classified, accumulate=2),
}
ONCE = ("plain", "several heads, a growing ratio", "fine-tuned, mixed")
BOTH = {name: ARMS[name] for name in ARMS if name not in ONCE}
"""Kinds that are trained sharded, too."""


def train_all(folder: Path, tar: str, names: list[str], parallel: str, stop: int | None = None) -> dict[str, Any]:
    """Train arms on this rank; by name (weights and average, mean losses, progress), the weights of rank 0 alone."""
    torch.set_num_threads(1)
    team = of_ranks()
    return {name: train_one(folder, tar, name, parallel, team, stop) for name in names}


def train_one(folder: Path, tar: str, name: str, parallel: str, team: Team, stop: int | None = None) -> Any:
    """stop: how often the last rank, and it alone, does not want to stop yet."""
    asked = ARMS[name](folder / f"{name}, {parallel}", images_of(tar))
    asked = replace(asked, train=replace(asked.train, parallel=parallel))
    losses: list[float] = []

    def log(event: dict[str, Any]) -> None:
        losses.extend([event["loss"]] if "loss" in event else [])

    wants = stop is not None and team.rank.rank == team.rank.ranks - 1
    how = hooks(StopAfter(stop)) if wants and stop is not None else hooks()
    progress, model = train_arm(asked, replace(how, log=log), team)
    return state_of(model) if team.leads and stop is None else None, losses, progress


def images_of(tar: str) -> ImageList:
    return open_images(tar).only(range(32))


def of_ranks() -> Ranks:
    """This process's place in the team."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return Ranks(rank_here())


def state_of(model: Learner) -> dict[str, Tensor]:
    parts = ((part, module.state_dict()) for part, module in model.parts.items())
    return {f"{part}/{name}": value.clone() for part, state in parts for name, value in state.items()}


def held(folder: Path, tar: str) -> tuple[int, int]:
    """Learning values of a sharded model: those that this rank holds, and all."""
    team, one = of_ranks(), masked(folder, images_of(tar), parallel="fsdp")
    model = one.make(one.segments[0])
    whole = sum(parameter.numel() for parameter in model.parameters())
    team.take(model, one.train)
    parts: list[Any] = list(model.parameters())
    return sum(parameter.to_local().numel() for parameter in parts), whole


# --- what ranks find out about each other -----------------------------------------------------------------------------


def ways_to_differ(folder: Path, tar: str) -> list[str]:
    """What a rank is told where rank 1 starts from another state, reads another cache, or has drifted."""
    torch.set_num_threads(1)
    team, images = of_ranks(), images_of(tar)
    mine = masked(folder / str(team.rank.rank), images)
    if team.rank.rank:
        train_arm(mine, hooks(StopAfter(1)))
    entry = SimpleNamespace(name="a", checksum=f"of rank {team.rank.rank}")
    cache: Any = SimpleNamespace(manifest=SimpleNamespace(fingerprint="0123456789", shards=[entry]))
    source = CachedFeatures(cache, Sampling(0, 8, DataConfig(), MODEL, MaskConfig(), (PIXELS,)))
    shared = masked(folder / "shared", images)
    drifts = replace(shared, make=partial(drifting, shared.make, team))
    return [
        refusal(lambda: train_arm(mine, hooks(), team)),
        refusal(lambda: team.source(lambda: source, 1)),
        refusal(lambda: train_arm(drifts, hooks(StopAfter(2)), team)),
    ]


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except RanksDiffer as error:
        return str(error)
    return "nothing"


def drifting(make: Callable[[Any], Learner], team: Team, part: Any) -> Learner:
    """A model that on rank 1 changes by itself after a step, as broken memory would have it."""
    model = make(part)

    def after_step(step: int) -> None:
        if team.rank.rank and step == 1:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] += 1e-6

    model.after_step = after_step  # type: ignore[method-assign]
    return model


def ended_by_the_leader(folder: Path, tar: str) -> tuple[int, str, int, int]:
    """Of an arm that ends at its first check: steps, why, how many checks, and how often this rank evaluated."""
    torch.set_num_threads(1)
    team, images, seen = of_ranks(), images_of(tar), []
    settling = Settling(Settle("change", 1e9, 1), 2, 1.0, torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    one = replace(masked(folder / "ends", images), settling=settling, keep={1: folder / "epoch-1"})
    watching = replace(hooks(), evaluate=lambda model: (seen.append("evaluated"), score(0.5))[1])
    watching = replace(watching, keep=lambda path, model: seen.append("kept"))
    progress, _ = train_arm(one, watching, team)
    assert progress.ended is not None
    return progress.totals[0].steps, progress.ended["why"], len(progress.checks), len(seen)
