"""Heads that begin anew where a stage does: what is new, what is not, and that a resume ends in the same bits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import HeadSpec
from stages.arm import Arm
from stages.checkpoint import read_state
from stages.images import ImageList, open_images
from stages.segment import Segment
from stages.sources import Source
from stages.train import build_model, train_arm
from tests.stages.loop import BUILD, STATE, arm, assert_same, hooks, parts, stopped_and_resumed

TWO = replace(BUILD, heads=(HeadSpec(2, "pixels"), HeadSpec(3, "pixels")))


@pytest.fixture(scope="module")
def images() -> ImageList:
    return open_images("sample").only(range(32))


def stage_of(segment: Segment) -> int:
    return min(segment.first_epoch, 1)


def anew(folder: Path, images: ImageList, **changes: Any) -> Arm:
    """Stage 0, then stage 1 in two parts, the first of which begins with new heads."""
    made = arm(folder, images, parts(0, 1, 1), **changes)
    make = lambda part: build_model(TWO, part.cut, "cpu", part.entry, stage_of(part))  # noqa: E731
    return replace(made, make=make, heads_of=stage_of)


class RestFrom:
    """A rate of 1e-3 before a step, 0 from it on: then nothing moves."""

    def __init__(self, step: int) -> None:
        self.step = step

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        rate = 1e-3 if step < self.step else 0.0
        for group in optimizer.param_groups:
            group["lr"] = rate
        return rate


def test_a_stage_begins_with_fresh_heads_and_the_encoder_that_there_was(tmp_path: Path, images: ImageList) -> None:
    train_arm(replace(arm(tmp_path / "zero", images, parts(0)), make=anew(tmp_path, images).make), hooks())
    before = read_state(tmp_path / "zero" / STATE)[2]
    _, model = train_arm(anew(tmp_path, images, start=tmp_path / "zero" / STATE, rates=RestFrom(4)), hooks())
    first, second = (build_model(TWO, 1, "cpu", stage=stage).heads.state_dict() for stage in (0, 1))
    drawn = [name for name in second if name.endswith("weight") and "norm" not in name] + [
        f"block{block}.decoder.mask_token" for block in (2, 3)
    ]
    found = model.heads.state_dict()
    assert found.keys() == second.keys() and all(torch.equal(found[name], second[name]) for name in second)
    for name in drawn:
        assert not torch.equal(found[name], before[f"decoder/{name}"]), f"{name} is not that of stage 0's end"
        assert not torch.equal(found[name], first[name]), f"{name} is not that of stage 0's start"
    for block in (2, 3):
        readout = {name for name in drawn if name.startswith(f"block{block}.readout")}
        assert readout, "what projects to the target is new, too"


def test_the_encoder_is_that_of_the_stage_before_with_its_moments(tmp_path: Path, images: ImageList) -> None:
    """Nothing moves from step 4 on, where stage 1 begins."""
    _, model = train_arm(anew(tmp_path, images, rates=RestFrom(4)), hooks())
    carried = replace(anew(tmp_path / "carried", images, rates=RestFrom(4)), heads_of=lambda segment: 0)
    _, other = train_arm(carried, hooks())
    assert_same(model.encoder, other.encoder)
    (_, progress, renewed), (_, _, kept) = (read_state(folder / STATE) for folder in (tmp_path, tmp_path / "carried"))
    assert [totals.steps for totals in progress.totals] == [4, 4, 4]
    assert renewed.keys() == kept.keys()
    steps = {name: (int(renewed[name]), int(kept[name])) for name in kept if name.endswith("/step")}
    heads = {counts for name, counts in steps.items() if name.startswith("optim/heads.")}
    assert heads == {(8, 12)}, "they learn for the two parts of stage 1; the second part renews nothing"
    assert {counts for name, counts in steps.items() if name.startswith("optim/encoder.")} == {(12, 12)}


@pytest.mark.parametrize("schedule", ["constant", "schedule_free"])
def test_a_resume_anywhere_ends_in_the_same_bits(tmp_path: Path, images: ImageList, schedule: str) -> None:
    stopped_and_resumed(lambda folder: anew(folder, images, lr_schedule=schedule), tmp_path, (2, 3, 4, 6, 9))


def test_a_run_that_died_between_two_stages_renews_once_it_goes_on(tmp_path: Path, images: ImageList) -> None:
    _, straight = train_arm(anew(tmp_path / "straight", images), hooks())
    dies = anew(tmp_path / "dies", images)

    def source(segment: Segment) -> Source:
        if segment.cut:
            raise KeyboardInterrupt
        return dies.source(segment)

    with pytest.raises(KeyboardInterrupt):
        train_arm(replace(dies, source=source), hooks())
    progress = read_state(tmp_path / "dies" / STATE)[1]
    assert (progress.segment, progress.step) == (1, 0)
    assert_same(straight, train_arm(dies, hooks())[1])
    assert_same(straight, train_arm(dies, hooks())[1])  # finished: its heads are those that it ended with


def test_only_the_first_segment_of_a_stage_renews(tmp_path: Path, images: ImageList) -> None:
    made = anew(tmp_path, images)
    assert [made.renews_heads(place) for place in range(3)] == [False, True, False]
    assert [replace(made, segments=made.segments[1:]).renews_heads(place) for place in range(2)] == [True, False]
    plain = arm(tmp_path, images, parts(0, 1, 1))
    assert not any(plain.renews_heads(place) for place in range(3))
