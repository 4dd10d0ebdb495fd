"""What the loop does between its first and last step: freezing in place, schedule-free weights, early ends, kept
encoders; and that a stop in between changes none of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache.buffers import FRESH, Buffers
from models.config import MaskConfig
from models.drop import DepthDrop
from models.learner import Learner
from models.mim import MaskedModel
from stages.arm import Arm
from stages.checkpoint import CheckpointError, read_state
from stages.config import DataConfig
from stages.endings import evaluations_without_gain, stopped_early
from stages.images import ImageList, open_images
from stages.optim import build_optimizer, parameter_groups
from stages.segment import Segment
from stages.sources import Inputs, LiveImages, Sampling
from stages.train import build_model, train_arm, train_step
from tests.stages.loop import (
    BUILD,
    HEADS,
    MODEL,
    STATE,
    TRAIN,
    Scores,
    StopAfter,
    arm,
    assert_same,
    hooks,
    parts,
    plain,
    score,
    stopped_and_resumed,
)


@pytest.fixture(scope="module")
def images() -> ImageList:
    return open_images("sample").only(range(32))


# --- freezing in place ------------------------------------------------------------------------------------------------


def test_a_block_frozen_in_place_runs_forward_and_never_backward(tmp_path: Path, images: ImageList) -> None:
    """Three parts of 4 steps at cuts 0, 1, 2: block 0 runs 12 times forward and 4 times backward, block 1 12 and 8."""
    forward, backward = [0, 0, 0], [0, 0, 0]
    held: list[set[str]] = []

    def make(segment: Segment) -> MaskedModel:
        model = build_model(BUILD, segment.cut, "cpu", segment.entry)
        for index, block in enumerate(model.encoder.vit.blocks):
            block.register_forward_hook(lambda *_, i=index: forward.__setitem__(i, forward[i] + 1))
            block.register_full_backward_hook(lambda *_, i=index: backward.__setitem__(i, backward[i] + 1))
        return model

    def optimizer(model: Learner) -> torch.optim.Optimizer:
        groups = parameter_groups(model, 0.05)
        names = {parameter: name for name, parameter in model.named_parameters()}
        held.append({names[parameter] for group in groups for parameter in group["params"]})
        return build_optimizer(groups, TRAIN)

    hooked = replace(arm(tmp_path, images, parts(0, 1, 2)), make=make, optimizer=optimizer)
    train_arm(hooked, hooks())
    assert forward == [12, 12, 12] and backward == [4, 8, 12]
    for cut, names in zip((0, 1, 2), held, strict=False):
        frozen = tuple(f"encoder.vit.blocks.{block}." for block in range(cut))
        assert not [name for name in names if cut and name.startswith((*frozen, "encoder.vit.patch_embed."))]
        assert [name for name in names if name.startswith(f"encoder.vit.blocks.{cut}.")]
    state = read_state(tmp_path / STATE)[2]
    assert not [name for name in state if name.startswith(tuple(f"optim/encoder.vit.blocks.{i}." for i in (0, 1)))]
    assert state["optim/encoder.vit.blocks.2.mlp.fc1.weight/step"].item() == 12, "what learns keeps its moments"


def test_a_stage_of_parts_is_evaluated_once_and_resumes(tmp_path: Path, images: ImageList) -> None:
    progress, _ = train_arm(arm(tmp_path / "once", images, parts(0, 1, 2)), hooks())
    assert [point["epoch"] for point in progress.curve] == [3.0]
    stopped_and_resumed(lambda folder: arm(folder, images, parts(0, 1, 2)), tmp_path, (1, 5, 9))


def test_blocks_behind_a_cache_run_on_the_visible_tokens(images: ImageList) -> None:
    """In place from entry 1 to cut 2: the batch is the one of cut 1 with block 1 run over it, and no gradient."""
    features, ids = torch.randn(2, 4, 24), torch.arange(4).repeat(2, 1)
    noise = torch.rand(2, 4)
    learning, in_place = build_model(BUILD, 1, "cpu"), build_model(BUILD, 2, "cpu", entry=1)
    before = learning.from_features(features, ids, noise, 3, {})
    after = in_place.from_features(features.requires_grad_(), ids, noise, 3, {})
    torch.testing.assert_close(after.visible_BKD, learning.encoder.run(before.visible_BKD, 1, 2))
    assert not after.visible_BKD.requires_grad and torch.equal(after.mask.ids_keep, before.mask.ids_keep)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    order = torch.arange(16).repeat(2, 1)
    assert torch.equal(in_place.frozen_features(pixels, order, 4)[0], learning.frozen_features(pixels, order, 4)[0])


def test_a_rate_of_zero_and_freezing_in_place_are_the_same(images: ImageList) -> None:
    """What makes freezing at the next epoch's start exact: at rate 0 a step leaves a block as it is, bit for bit."""
    source = LiveImages(images, Sampling(0, 8, DataConfig(), MODEL, MaskConfig(), HEADS))
    (segment,) = parts(0)
    for name in ("cosine", "schedule_free"):
        train = replace(TRAIN, lr_schedule=name)
        model = build_model(BUILD, 0, "cpu")
        optimizer = build_optimizer(parameter_groups(model, 0.05, by_layer=True), train)
        for step in range(3):
            before = {key: value.clone() for key, value in model.encoder.vit.state_dict().items()}
            for group in optimizer.param_groups:
                group["lr"] = 0.0 if step and group["layer"] in (0, 1) else 1e-3
            train_step(model, optimizer, source, source.load(segment, step), train)
            after = model.encoder.vit.state_dict()
            changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
            still = {key for key in after if key.startswith(("patch_embed.", "blocks.0."))}
            assert still <= changed if not step else not still & changed
            assert {key for key in after if key.startswith("blocks.1.")} <= changed


# --- schedule-free ----------------------------------------------------------------------------------------------------


def test_schedule_free_resumes_to_the_same_bits(tmp_path: Path, images: ImageList) -> None:
    """Stopped mid-epoch, at an evaluation, and in a stage's second part."""
    stopped_and_resumed(
        lambda folder: arm(folder, images, parts(0, 1), lr_schedule="schedule_free", eval_every=1, clip=0.1),
        tmp_path,
        (0, 2, 3, 5),
    )


def test_schedule_free_resumes_where_dropped_blocks_have_not_learnt_yet(tmp_path: Path, images: ImageList) -> None:
    """Blocks that are skipped in the first steps count their group's steps all the same, whenever a run is resumed."""
    build = replace(BUILD, drop=DepthDrop(1, 0.0, 0.9, 100))
    late = tuple(replace(part, first_step=80, first_epoch=20) for part in parts(0, epochs=2))

    def make(folder: Path) -> Arm:
        asked = arm(folder, images, late, lr_schedule="schedule_free")
        return replace(asked, make=lambda part: build_model(build, part.cut, "cpu", part.entry))

    train_arm(make(tmp_path / "first"), hooks(StopAfter(1)))
    state = read_state(tmp_path / "first" / STATE)[2]
    learnt = [f"optim/encoder.vit.blocks.{block}.mlp.fc1.weight/z" in state for block in range(3)]
    assert not all(learnt), "some block has been skipped in both steps"
    stopped_and_resumed(make, tmp_path, (0, 1, 2, 4))


def test_the_averaged_weights_are_scored_kept_and_handed_on(tmp_path: Path, images: ImageList) -> None:
    scored: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []

    def weight(model: Any) -> torch.Tensor:
        return model.encoder.vit.blocks[1].mlp.fc1.weight.detach().clone()

    how = hooks(
        evaluate=lambda model: scored.append(weight(model)) or score(0.5),
        keep=lambda path, model: kept.append(weight(model)),
    )
    asked = arm(tmp_path, images, parts(0, 1), lr_schedule="schedule_free", eval_every=1, keep={1: tmp_path / "e"})
    _, model = train_arm(asked, how)
    assert torch.equal(kept[0], scored[0]), "after the first epoch"
    state = read_state(tmp_path / STATE)[2]
    assert torch.equal(scored[1], weight(model))
    assert torch.equal(state["encoder/blocks.1.mlp.fc1.weight"], weight(model))
    z = state["optim/encoder.vit.blocks.1.mlp.fc1.weight/z"]
    assert not torch.equal(z, weight(model))
    steps, weight_sum, largest, training = state["optim/encoder.vit.blocks.1.mlp.fc1.weight/scalars"].tolist()
    assert (steps, largest, training) == (8.0, 1e-3, 0.0), "moments and average went on across the freeze"
    warmup = [(1e-3 / 2) ** 2, (1e-3) ** 2]  # the largest rate so far, squared, weighs every step's point
    assert weight_sum == pytest.approx(sum(warmup) + 6 * 1e-6)
    assert not [name for name in state if name.startswith("optim/encoder.vit.blocks.0.")]


# --- early ends -------------------------------------------------------------------------------------------------------


def test_evaluations_without_gain_by_hand() -> None:
    series = ([], [0.1], [0.1, 0.2], [0.2, 0.1], [0.2, 0.2, 0.2], [0.1, 0.3, 0.2, 0.25], [0.1, None, 0.0])
    assert [evaluations_without_gain(scores) for scores in series] == [0, 0, 0, 1, 2, 2, 0]
    curve = [{"epoch": float(epoch), "knn_top1": knn} for epoch, knn in enumerate([0.1, 0.3, 0.2, 0.25], 1)]
    assert stopped_early(curve, 2) == "kNN no better than 0.300 of epoch 2 in 2 evaluations"
    assert stopped_early(curve, 3) == stopped_early(curve, 0) == stopped_early(curve[:3], 2) == ""


def test_an_arm_ends_when_its_knn_no_longer_rises(tmp_path: Path, images: ImageList) -> None:
    segments = parts(0, 1, 2, epochs=2)
    asked = arm(tmp_path, images, segments, early_stop=2, eval_every=1)
    events: list[dict[str, Any]] = []
    progress, model = train_arm(asked, hooks(evaluate=Scores(0.1, 0.3, 0.2, 0.25, 0.9), log=events.append))
    assert progress.ended == {"why": "kNN no better than 0.300 of epoch 2 in 2 evaluations", "epoch": 4.0}
    assert [totals.steps for totals in progress.totals] == [8, 8] and progress.segment == 3
    assert [event for event in events if "ended" in event] == [
        {"stage": 0, "ended": progress.ended["why"], "epoch": 4.0}
    ]
    assert [event["lr"] for event in events if "lr" in event][-1] == asked.rates.plain(15), "its place in the schedule"
    again, same = train_arm(asked, hooks())
    assert_same(model, same)
    assert model.encoder.cut == same.encoder.cut == 1, "the model of the segment that was trained last"
    assert plain(again) == plain(progress), "what has ended is not gone on with"


def test_an_early_end_resumes(tmp_path: Path, images: ImageList) -> None:
    scores = Scores(0.1, 0.3, 0.2, 0.25, 0.9)
    stopped_and_resumed(
        lambda folder: arm(folder, images, parts(0, epochs=6), early_stop=2, eval_every=1, lr_schedule="constant"),
        tmp_path,
        (2, 7, 14),
        evaluate=scores,
    )
    assert read_state(tmp_path / "straight" / STATE)[1].ended["epoch"] == 4.0  # type: ignore[index]


def test_the_last_step_ends_nothing_early(tmp_path: Path, images: ImageList) -> None:
    progress, _ = train_arm(
        arm(tmp_path, images, parts(0, epochs=3), early_stop=2, eval_every=1), hooks(evaluate=Scores(0.3, 0.2, 0.1))
    )
    assert progress.ended is None and [point["knn_top1"] for point in progress.curve] == [0.3, 0.2, 0.1]


# --- kept encoders ----------------------------------------------------------------------------------------------------


def test_encoders_are_kept_after_their_epochs_and_missing_ones_bring_the_training_back(
    tmp_path: Path, images: ImageList
) -> None:
    kept: list[str] = []

    def keep(path: Path, model: Any) -> None:
        kept.append(path.name)
        path.parent.mkdir(exist_ok=True)
        torch.save(model.encoder.vit.state_dict(), path)

    segments = tuple(
        replace(part, first_epoch=part.first_epoch + 5, first_step=part.first_step + 20)
        for part in parts(0, 1, epochs=2)
    )
    paths = {epoch: tmp_path / f"epoch-{epoch}" for epoch in (6, 9)}
    asked = arm(tmp_path, images, segments, keep=paths)
    _, model = train_arm(asked, hooks(keep=keep))
    assert kept == ["epoch-6", "epoch-9"]
    last = torch.load(paths[9])
    assert all(torch.equal(value, last[name]) for name, value in model.encoder.vit.state_dict().items())
    train_arm(asked, hooks(keep=keep))
    assert kept == ["epoch-6", "epoch-9"], "a finished arm whose files are there is not trained again"
    paths[6].unlink()
    _, again = train_arm(asked, hooks(keep=keep))
    assert kept == ["epoch-6", "epoch-9"] * 2
    assert_same(model, again)


def test_a_stopped_arm_that_has_passed_an_epoch_to_keep_is_not_thrown_away(tmp_path: Path, images: ImageList) -> None:
    """Stopped after 6 steps of 4 an epoch. Only loads from step 6 on, or from 0 where its state was deleted."""
    for epoch, first in ((2, 6), (1, 0)):
        loaded: list[int] = []

        class Noting(LiveImages):
            def load(self, segment: Segment, step: int, into: Buffers = FRESH) -> Inputs:
                loaded.append(step)  # noqa: B023
                return super().load(segment, step)

        started = arm(tmp_path / str(epoch), images, parts(0, epochs=3))
        train_arm(started, hooks(StopAfter(5)))
        source = Noting(images, started.source(started.segments[0]).sampling)  # type: ignore[attr-defined]
        path, saved = tmp_path / f"epoch-{epoch}", started.state.read_bytes()
        later = replace(started, keep={epoch: path}, source=lambda segment, source=source: source)
        how = hooks(keep=lambda path, model: path.write_bytes(b"kept"))
        if first == 0:
            remedy = "put it back, take 1 from train.save_epochs, or delete the state to train stage 0 anew"
            with pytest.raises(CheckpointError, match=f"{path} is not there, and {started.state} has .*; {remedy}"):
                train_arm(later, how)
            assert started.state.read_bytes() == saved and loaded == []
            started.state.unlink()
        progress, _ = train_arm(later, how)
        assert min(loaded) == first and progress.totals[0].steps == 12
