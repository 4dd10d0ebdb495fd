"""The training loop: exact accumulation, what learns, precision, cadence, accounts, and states to go on from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save

from models.config import DecoderConfig, HeadSpec, MaskConfig, ModelConfig
from models.mim import MaskedModel
from stages.arm import Arm, Hooks
from stages.book import Diverged
from stages.checkpoint import (
    CheckpointError,
    Progress,
    SegmentTotals,
    apply_tensors,
    model_tensors,
    read_state,
    save_state,
)
from stages.config import DataConfig, ScheduleConfig, TrainConfig
from stages.images import ImageList, open_images
from stages.optim import Rates, build_adamw, parameter_groups
from stages.probe import ProbeResult
from stages.schedule import StagePlan
from stages.segment import Segment, as_end_to_end, segments_of, trained_epochs
from stages.sources import Inputs, LiveImages, Sampling
from stages.train import Build, build_model, evaluation_due, train_arm, train_step

MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=3, heads=2)
HEADS = (HeadSpec(3, "pixels"),)
BUILD = Build(0, MODEL, DecoderConfig(depth=1, width=12, heads=3), HEADS)
TRAIN = TrainConfig(batch_size=8, precision="float32", device="cpu", threads=1, lr=1e-3, warmup_epochs=0.5)
SEGMENT = Segment(cut=0, first_epoch=0, epochs=2, first_step=0, steps=8, steps_per_epoch=4)


@pytest.fixture(scope="module")
def images() -> ImageList:
    return open_images("sample").only(range(32))


def source(images: ImageList, batch_size: int = 8) -> LiveImages:
    return LiveImages(images, Sampling(0, batch_size, DataConfig(), MODEL, MaskConfig(), HEADS))


def arm(tmp_path: Path, images: ImageList, segments: tuple[Segment, ...] = (SEGMENT,), **train: object) -> Arm:
    settings = replace(TRAIN, **train)  # type: ignore[arg-type]
    return Arm(
        tag={"stage": 0},
        segments=segments,
        make=lambda segment: build_model(BUILD, segment.cut, "cpu", segment.entry),
        optimizer=lambda model: build_adamw(parameter_groups(model, settings.weight_decay), settings),
        train=settings,
        rates=Rates(settings, ScheduleConfig(), 3, 12, 4),
        source=lambda segment: source(images),
        state=tmp_path / "last" / "state.safetensors",
        start=None,
        inputs="asked",
    )


def hooks(events: list | None = None, stop: object = None) -> Hooks:
    found = events if events is not None else []
    return Hooks(found.append, lambda model: ProbeResult(0.5, 0.5, 0.1, 2.0, 40), stop or (lambda: False))  # type: ignore[arg-type]


def gradients(images: ImageList, accumulate: int) -> tuple[float, dict[str, torch.Tensor]]:
    model = build_model(BUILD, 1, "cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    from_images = source(images)
    loss = train_step(
        model, optimizer, from_images, from_images.load(SEGMENT, 0), replace(TRAIN, accumulate=accumulate)
    )
    assert loss[0] == loss[1]
    return loss[0].item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(images: ImageList, accumulate: int) -> None:
    loss, whole = gradients(images, 1)
    parts_loss, parts = gradients(images, accumulate)
    assert parts_loss == pytest.approx(loss, rel=1e-6) and whole.keys() == parts.keys() and len(whole) > 20
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-6)


def test_clipping_bounds_the_step(images: ImageList) -> None:
    def moved(clip: float) -> float:
        model = build_model(BUILD, 0, "cpu")
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        train_step(model, optimizer, source(images), source(images).load(SEGMENT, 0), replace(TRAIN, clip=clip))
        after = model.parameters()
        return sum(float((b - a).detach().square().sum()) for a, b in zip(before, after, strict=True)) ** 0.5

    assert moved(0.01) == pytest.approx(0.01, rel=1e-3) and moved(0.0) > 0.1


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_precision_is_that_of_frozen_and_learning_blocks_alike(
    images: ImageList, precision: str, dtype: torch.dtype
) -> None:
    model = build_model(BUILD, 1, "cpu")
    seen: dict[int, torch.dtype] = {}
    for index, block in enumerate(model.encoder.vit.blocks):
        block.mlp.fc1.register_forward_hook(lambda _, __, out, index=index: seen.update({index: out.dtype}))
    optimizer = build_adamw(parameter_groups(model, 0.05), TRAIN)
    loss = train_step(
        model, optimizer, source(images), source(images).load(SEGMENT, 0), replace(TRAIN, precision=precision)
    )
    assert set(seen.values()) == {dtype} and len(seen) == 3 and loss.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_source_is_a_pure_function_of_the_step_and_fresh_in_every_epoch(images: ImageList) -> None:
    one, again = source(images).load(SEGMENT, 1), source(images).load(replace(SEGMENT, cut=2), 1)
    assert torch.equal(one.values, again.values) and torch.equal(one.noise, again.noise)
    later = source(images).load(SEGMENT, 5)
    assert not torch.equal(one.noise, later.noise)
    first_epoch = sorted(row for step in range(4) for row in source(images).sampling.rows(SEGMENT, step, 32))
    assert first_epoch == list(range(32))


def test_inputs_split_into_equal_parts_in_order() -> None:
    whole = Inputs(torch.arange(12).reshape(6, 2), torch.arange(6.0), 0.5, group=3)
    parts = whole.split(3)
    assert [part.values.tolist() for part in parts] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert all(part.ids_BL is None and part.group == 3 and part.progress == 0.5 for part in parts)


def test_segments_follow_the_plan_and_max_steps_bounds_each() -> None:
    plan = (StagePlan(0, 0, 2, 0), StagePlan(1, 3, 1, 2))
    assert segments_of(plan, 10, TRAIN) == (Segment(0, 0, 2, 0, 20, 10), Segment(3, 2, 1, 20, 10, 10))
    short = segments_of(plan, 10, replace(TRAIN, max_steps=4))
    assert [(s.first_step, s.steps, s.first_epoch) for s in short] == [(0, 4, 0), (4, 4, 2)]
    assert [s.cut for s in as_end_to_end(short)] == [0, 0]
    assert [[s.epoch(step) for step in (0, 3)] for s in short] == [[0, 0], [2, 2]], "rows go by the plan's epochs"
    assert [[s.trained(step) for step in (0, 4)] for s in short] == [[0.0, 0.4], [0.4, 0.8]]
    assert trained_epochs(short) == 0.8 and trained_epochs(segments_of(plan, 10, TRAIN)) == 3.0


def test_evaluation_is_due_at_every_nth_epoch_and_at_the_end(tmp_path: Path, images: ImageList) -> None:
    every = replace(arm(tmp_path, images), eval_every=1)
    assert [step for step in range(1, 9) if evaluation_due(every, SEGMENT, step)] == [4, 8]
    assert [step for step in range(1, 9) if evaluation_due(arm(tmp_path, images), SEGMENT, step)] == [8]
    later = replace(SEGMENT, first_epoch=1, epochs=4, first_step=4, steps=16)
    assert [s for s in range(1, 17) if evaluation_due(replace(every, eval_every=2), later, s)] == [4, 12, 16]
    behind = replace(SEGMENT, first_epoch=2, epochs=4, first_step=2, steps=16)  # train.max_steps ended a stage early
    assert [s for s in range(1, 17) if evaluation_due(replace(every, eval_every=2), behind, s)] == [6, 14, 16]


def test_an_arm_of_two_segments_freezes_in_between_and_keeps_moments(tmp_path: Path, images: ImageList) -> None:
    second = Segment(cut=2, first_epoch=2, epochs=1, first_step=8, steps=4, steps_per_epoch=4)
    one, _ = train_arm(arm(tmp_path / "a", images), hooks())
    after_one = read_state(tmp_path / "a" / "last" / "state.safetensors")[2]
    progress, model = train_arm(arm(tmp_path / "b", images, (SEGMENT, second)), hooks())
    assert (progress.segment, [t.steps for t in progress.totals]) == (2, [8, 4]) and one.segment == 1
    state = model.encoder.vit.state_dict()
    assert all(
        torch.equal(state[n], after_one[f"encoder/{n}"])
        for n in state
        if n.startswith(("blocks.0", "blocks.1", "patch"))
    )
    assert not torch.equal(state["blocks.2.mlp.fc1.weight"], after_one["encoder/blocks.2.mlp.fc1.weight"])
    final = read_state(tmp_path / "b" / "last" / "state.safetensors")[2]
    assert not [name for name in final if name.startswith("optim/encoder.vit.blocks.0.")]
    assert final["optim/encoder.vit.blocks.2.mlp.fc1.weight/step"].item() == 12


class StopAfter:
    """False so many times, then True."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_a_stopped_arm_goes_on_to_the_same_bits_losses_and_curve(tmp_path: Path, images: ImageList) -> None:
    straight_events: list = []
    straight, model = train_arm(arm(tmp_path / "a", images), hooks(straight_events))
    for stop_at in (0, 3, 6):
        asked = StopAfter(stop_at)
        stopped, _ = train_arm(arm(tmp_path / f"b{stop_at}", images), hooks(stop=asked))
        assert stopped.segment == 0 and 0 < stopped.step < 8
        resumed, again = train_arm(arm(tmp_path / f"b{stop_at}", images), hooks())
        for name, value in model.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name
        for key in ("loss_sum", "loss_steps", "first_loss", "steps", "images"):
            assert getattr(resumed.totals[0], key) == getattr(straight.totals[0], key)
        assert [p["epoch"] for p in resumed.curve] == [p["epoch"] for p in straight.curve]


def test_a_state_of_another_request_is_not_gone_on_from(tmp_path: Path, images: ImageList) -> None:
    train_arm(arm(tmp_path, images), hooks())
    progress, _ = train_arm(replace(arm(tmp_path, images, lr=2e-3), inputs="something else"), hooks())
    assert progress.totals[0].steps == 8
    assert read_state(tmp_path / "last" / "state.safetensors")[0] == "something else"


def test_a_loss_that_is_no_number_stops_the_arm(tmp_path: Path, images: ImageList) -> None:
    with pytest.raises(Diverged, match=r"stage 0: loss=(nan|inf) near step \d+; lower train.lr="):
        train_arm(arm(tmp_path, images, lr=1e30, min_lr=1e30, warmup_epochs=0.0), hooks())


def test_accounts_split_the_time_by_the_clock_given(tmp_path: Path, images: ImageList) -> None:
    ticks = iter(range(10_000))
    events: list = []
    clock = replace(hooks(events), now=lambda: float(next(ticks)))
    progress, _ = train_arm(arm(tmp_path, images, save_every=1e9), clock)
    totals = progress.totals[0]
    assert totals.train_seconds > 0 and totals.evaluate_seconds == 1.0
    steps = [event for event in events if "loss" in event]
    assert sum(e["loss"] for e in steps) > 0 and steps[-1]["step"] == 8 and steps[-1]["images"] == 64


@pytest.mark.parametrize(("each_time", "lost"), [(0, 0.0), (10**6, 1.0)])
def test_seconds_that_went_to_other_work_are_told_apart(
    tmp_path: Path, images: ImageList, each_time: int, lost: float
) -> None:
    ticks, taken = iter(range(100_000)), iter(range(0, 10**9, each_time or 1))
    rim = replace(hooks(), now=lambda: float(next(ticks)), others=lambda: float(next(taken)) if each_time else 0.0)
    progress, _ = train_arm(arm(tmp_path, images, save_every=1e9, threads=psutil.cpu_count()), rim)
    assert progress.crowded_seconds == lost * progress.train_seconds
    assert progress.train_seconds > 0


def test_a_state_round_trips_and_damage_is_refused(tmp_path: Path) -> None:
    model = build_model(BUILD, 1, "cpu")
    optimizer = build_adamw(parameter_groups(model, 0.05), TRAIN)
    progress = Progress(1, 3, [SegmentTotals(1.5, 0.25, 2.0, 64, 8, 3.5, 4, 0.9)], [{"epoch": 1.0, "knn_top1": 0.5}])
    path = tmp_path / "state.safetensors"
    save_state(path, "asked", progress, model_tensors(model, optimizer))
    inputs, found, tensors = read_state(path)
    assert (inputs, found) == ("asked", progress)
    other = build_model(replace(BUILD, seed=1), 1, "cpu")
    apply_tensors(other, build_adamw(parameter_groups(other, 0.05), TRAIN), tensors)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="no readable state"):
        read_state(path)


@pytest.mark.parametrize("what", ["a weight", "the loss so far", "what was asked"])
def test_a_state_that_was_altered_is_refused(tmp_path: Path, what: str) -> None:
    model = build_model(BUILD, 1, "cpu")
    path = tmp_path / "state.safetensors"
    progress = Progress(0, 3, [SegmentTotals(loss_sum=3.5)])
    save_state(path, "asked", progress, model_tensors(model, build_adamw(parameter_groups(model, 0.05), TRAIN)))
    content = bytearray(path.read_bytes())
    place = {"a weight": -3, "the loss so far": content.index(b"3.5"), "what was asked": content.index(b"asked")}[what]
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="was altered since it was saved; delete it to train this stage anew"):
        read_state(path)


def test_a_state_of_a_version_without_a_digest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    header = {"version": "2", "inputs": "asked", "progress": Progress(0, 3).to_json()}
    path.write_bytes(save({"encoder/x": torch.ones(2)}, metadata=header))
    inputs, progress, tensors = read_state(path)
    assert (inputs, progress.step, tensors["encoder/x"].tolist()) == ("asked", 3, [1.0, 1.0])


def test_nothing_frozen_is_in_the_optimiser() -> None:
    model: MaskedModel = build_model(BUILD, 2, "cpu")
    inside = {id(p) for group in parameter_groups(model, 0.05) for p in group["params"]}
    frozen = [name for name, p in model.named_parameters() if id(p) not in inside]
    starts = ("encoder.vit.pos_embed", "encoder.vit.patch_embed", "encoder.vit.blocks.0", "encoder.vit.blocks.1")
    assert frozen and all(name.startswith(starts) for name in frozen)
    assert all(not p.requires_grad for name, p in model.named_parameters() if id(p) not in inside)
