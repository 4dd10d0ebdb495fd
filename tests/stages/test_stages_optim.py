"""What the optimiser holds and at which rates: frozen parameters in no group, decay on matrices only, rates by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models.config import DecoderConfig, HeadSpec, ModelConfig
from models.mim import MaskedModel
from models.multiscale import build_heads
from models.vit import build_encoder
from stages.config import ScheduleConfig, TrainConfig
from stages.optim import (
    Rates,
    ScheduleFree,
    averaged,
    build_adamw,
    build_optimizer,
    layer_of,
    learning_rate,
    parameter_groups,
    to_average,
    to_training,
)
from stages.schedule import FreezeOut

CONFIG = ModelConfig(image_size=8, patch_size=4, width=8, depth=4, heads=2)


def model(cut: int) -> MaskedModel:
    encoder = build_encoder(CONFIG, seed=0)
    heads = build_heads((HeadSpec(4, "pixels"),), DecoderConfig(depth=1, width=8, heads=2), encoder, 4, seed=0)
    return MaskedModel(encoder, heads, cut)


def names_in(learner: MaskedModel, groups: list[dict]) -> list[set[str]]:
    """The names of each group's parameters, every one of them once."""
    name = {id(parameter): name for name, parameter in learner.named_parameters()}
    found = [{name[id(parameter)] for parameter in group["params"]} for group in groups]
    assert len(set.union(*found)) == sum(len(group["params"]) for group in groups)
    return found


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 2])
@pytest.mark.parametrize("by_layer", [False, True])
def test_groups_hold_what_learns_and_nothing_frozen(cut, by_layer) -> None:
    learner = model(cut)
    held = set.union(*names_in(learner, parameter_groups(learner, 0.05, by_layer)))
    everything = {name for name, _ in learner.named_parameters()}
    before = tuple(f"encoder.vit.blocks.{block}." for block in range(cut))
    frozen = {name for name in everything if cut and name.startswith(("encoder.vit.patch_embed.", *before))}
    assert held == everything - frozen - {"encoder.vit.pos_embed"}
    assert len(frozen) == (2 + 2 * 12 if cut else 0), "the patch embedding's 2 and 12 of each frozen block"


def test_only_matrices_decay() -> None:
    learner = model(0)
    decaying, plain = sorted(parameter_groups(learner, 0.05), key=lambda group: -group["weight_decay"])
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert all(parameter.ndim >= 2 for parameter in decaying["params"])
    names, without = names_in(learner, [decaying, plain])
    assert {
        "encoder.vit.patch_embed.proj.weight",
        "encoder.vit.blocks.3.attn.qkv.weight",
        "heads.block4.readout.head.weight",
    } < names
    assert {"heads.block4.decoder.mask_token", "encoder.vit.norm.weight", "encoder.vit.blocks.0.mlp.fc1.bias"} < without
    assert all(name.endswith((".bias", "mask_token")) or "norm" in name for name in without)


def test_groups_by_layer_are_freezeouts() -> None:
    learner = model(2)
    groups = parameter_groups(learner, 0.05, by_layer=True)
    assert sorted((group["layer"], group["weight_decay"]) for group in groups) == [
        (layer, decay) for layer in (-1, 3, 4) for decay in (0.0, 0.05)
    ]
    for group, names in zip(groups, names_in(learner, groups), strict=True):
        assert {layer_of(name) for name in names} == {group["layer"]}
    assert layer_of("encoder.vit.patch_embed.proj.bias") == 0 and layer_of("encoder.vit.blocks.11.norm1.weight") == 12
    assert {layer_of(f"encoder.vit.{name}") for name in ("cls_token", "pos_embed", "reg_token")} == {0}
    assert layer_of("encoder.vit.norm.weight") == layer_of("heads.block4.decoder.blocks.0.norm1.weight") == -1


def test_adamw_decays_by_rate_times_weight() -> None:
    """With zero gradients a step leaves weights x (1 - lr x decay), and biases as they are."""
    learner = model(2)
    optimizer = build_adamw(parameter_groups(learner, 0.5), TrainConfig(lr=0.1, beta2=0.9))
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.9)}
    before = {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in learner.named_parameters():
        decays = parameter.requires_grad and parameter.ndim >= 2
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if decays else 1.0))


# --- rates ------------------------------------------------------------------------------------------------------------


def test_a_cosine_rate_at_warmup_peak_and_end() -> None:
    """10 steps of warm-up, then 90: cos(pi/3) = 1/2 after 30 of them, cos(pi/2) = 0 after 45."""

    def rate(step: int) -> float:
        return learning_rate(step, total_steps=100, warmup_steps=10, peak=1.0, minimum=0.2, schedule="cosine")

    assert [rate(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert [rate(step) for step in (10, 40, 55, 100)] == pytest.approx([1.0, 0.8, 0.6, 0.2])
    falling = [rate(step) for step in range(10, 101)]
    assert falling == sorted(falling, reverse=True)


def test_a_constant_rate_and_none_of_warmup() -> None:
    assert [learning_rate(step, 10, 2, 0.4, 0.0, "constant") for step in range(4)] == [0.2, 0.4, 0.4, 0.4]
    assert learning_rate(0, 10, 0, 0.4, 0.0, "cosine") == 0.4
    assert learning_rate(0, 1, 1, 0.4, 0.0, "cosine") == learning_rate(1, 1, 1, 0.4, 0.0, "cosine") == 0.4


def rates(kind: str, **train: object) -> Rates:
    settings = TrainConfig(lr=0.1, min_lr=0.0, warmup_epochs=2.0, **train)
    return Rates(settings, ScheduleConfig(kind=kind), num_blocks=4, total_steps=110, steps_per_epoch=5)


def test_without_freezeout_all_layers_share_one_rate() -> None:
    plain = rates("explicit")
    assert plain.warmup_steps == 10 and not plain.by_layer
    for step in (0, 10, 60, 109):
        want = learning_rate(step, 110, 10, 0.1, 0.0, "cosine")
        assert {plain.of_layer(layer, step) for layer in (-1, 0, 4)} == {want}
    assert plain.of_layer(0, 60) == pytest.approx(0.05)


def test_freezeout_gives_every_layer_its_rate_after_warmup() -> None:
    by_layer = rates("freezeout")
    rule = FreezeOut(num_layers=4, total_steps=100, t0=0.8, scale="cubic", base_lr=0.1)
    assert by_layer.by_layer
    assert {by_layer.of_layer(layer, 4) for layer in (-1, 0, 4)} == {0.05}, "one warm-up for all"
    for layer in range(5):
        for step in (10, 40, 61, 62, 109):
            assert by_layer.of_layer(layer, step) == rule.lr(layer, step - 10)
    assert by_layer.of_layer(0, 61) > 0 and by_layer.of_layer(0, 62) == 0, "layer 0 learns for 51.2 steps"
    assert by_layer.of_layer(-1, 60) == pytest.approx(0.05), "the decoder follows the plain cosine"


def test_rates_are_set_on_the_groups_they_belong_to() -> None:
    learner, by_layer = model(0), rates("freezeout")
    optimizer = build_adamw(parameter_groups(learner, 0.05, by_layer=True), by_layer.train)
    assert (
        by_layer.apply(optimizer, 70)
        == by_layer.of_layer(-1, 70)
        == pytest.approx(0.05 * (1 + math.cos(0.6 * math.pi)))
    )
    assert {(group["layer"], group["lr"]) for group in optimizer.param_groups} == {
        (layer, by_layer.of_layer(layer, 70)) for layer in range(-1, 5)
    }
    assert by_layer.of_layer(0, 70) == 0 < by_layer.of_layer(4, 70)


def test_warmup_never_takes_the_whole_run() -> None:
    assert (
        Rates(TrainConfig(warmup_epochs=9.0), ScheduleConfig(), 4, total_steps=10, steps_per_epoch=5).warmup_steps == 9
    )


def test_wsd_is_stable_then_falls_linearly() -> None:
    """10 steps of warm-up of 100, the last 20 decay: half way down after 10 of them."""

    def rate(step: int, share: float = 0.2) -> float:
        return learning_rate(step, 100, 10, peak=1.0, minimum=0.2, schedule="wsd", decay_share=share)

    assert [rate(step) for step in (0, 9, 10, 50, 80)] == pytest.approx([0.1, 1.0, 1.0, 1.0, 1.0])
    assert [rate(step) for step in (85, 90, 95, 100)] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [rate(step, 1.0) for step in (10, 55, 100)] == pytest.approx([1.0, 0.6, 0.2]), "after the warm-up"
    assert rate(99, 0.0) == 1.0 and learning_rate(50, 100, 10, 1.0, 0.2, "schedule_free") == 1.0


def test_a_restart_begins_anew_at_every_stage() -> None:
    """Stages of 40, 40 and 30 steps, each with 10 of warm-up: each is what a run of its own would be."""
    anew = replace(rates("explicit", lr_restart=True), stage_starts=(0, 40, 80))
    for start, steps in ((0, 40), (40, 40), (80, 30)):
        for step in range(steps):
            want = learning_rate(step, steps, 10, 0.1, 0.0, "cosine")
            assert anew.of_layer(-1, start + step) == anew.of_layer(2, start + step) == want
    assert anew.of_layer(-1, 40) == pytest.approx(0.01) and anew.of_layer(-1, 65) == pytest.approx(0.05)
    assert replace(anew, train=replace(anew.train, lr_restart=False)).of_layer(-1, 60) == pytest.approx(0.05)


def test_shared_rates_are_the_plain_schedule_until_a_layer_freezes() -> None:
    """100 steps after 10 of warm-up; layers 0 and 2 of 4 learn for 51.2 and 72.9 of them."""
    shared = rates("freezeout", lr_schedule="constant")
    shared = replace(shared, schedule=replace(shared.schedule, layer_rates="shared"))
    assert [shared.of_layer(0, step) for step in (10, 61, 62, 109)] == [0.1, 0.1, 0.0, 0.0]
    assert [shared.of_layer(2, step) for step in (10, 82, 83)] == [0.1, 0.1, 0.0]
    assert shared.of_layer(4, 109) == shared.of_layer(-1, 109) == 0.1


def test_an_embedding_that_does_not_freeze_follows_the_plain_schedule() -> None:
    kept = rates("freezeout")
    kept = replace(kept, schedule=replace(kept.schedule, freeze_embed=False))
    assert kept.of_layer(0, 70) == kept.of_layer(-1, 70) > 0
    assert kept.of_layer(1, 109) == 0.0, "the blocks' rates still fall"


def test_the_end_to_end_arm_follows_the_plain_schedule_in_all_layers() -> None:
    plain = replace(rates("freezeout"), freezes=False)
    assert not plain.by_layer
    for step in (4, 10, 62, 109):
        assert {plain.of_layer(layer, step) for layer in range(-1, 5)} == {rates("explicit").of_layer(-1, step)}
    assert plain.of_layer(0, 109) > 0 == rates("freezeout").of_layer(0, 109)


# --- schedule-free ----------------------------------------------------------------------------------------------------


def run(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, gradients: list[float], lr: float) -> None:
    for gradient in gradients:
        for group in optimizer.param_groups:
            group["lr"] = lr
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()


def test_schedule_free_follows_its_paper() -> None:
    """beta2 = 0 makes every normalised gradient its sign: z falls by the rate at each step, and x, the mean of z_1..z_t
    for a constant rate, is what is handed on."""
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer(
        [{"params": [parameter], "weight_decay": 0.0, "layer": -1}],
        TrainConfig(lr=0.1, beta2=0.0, lr_schedule="schedule_free"),
    )
    assert isinstance(optimizer, ScheduleFree)
    run(optimizer, parameter, [3.0, 3.0, 3.0], 0.1)
    assert optimizer.state[parameter]["z"].item() == pytest.approx(0.7)
    mean = (0.9 + 0.8 + 0.7) / 3
    assert parameter.item() == pytest.approx(0.9 * mean + 0.1 * 0.7), "y, where gradients are taken"
    held = parameter.detach().clone()
    with averaged(optimizer):
        assert parameter.item() == pytest.approx(mean)
    assert torch.equal(parameter, held), "bit for bit"
    to_average(optimizer)
    assert parameter.item() == pytest.approx(mean)


def test_a_resting_group_does_not_drift() -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = ScheduleFree([{"params": [parameter], "layer": 1}], lr=0.1, betas=(0.9, 0.9))
    optimizer.train()
    run(optimizer, parameter, [1.0, -2.0], 0.1)
    before = parameter.detach().clone(), optimizer.state[parameter]["z"].clone()
    run(optimizer, parameter, [5.0, 5.0], 0.0)
    assert torch.equal(parameter, before[0]) and torch.equal(optimizer.state[parameter]["z"], before[1])


def test_new_parameters_in_an_old_group_begin_with_their_own_bias_correction() -> None:
    """A parameter that first learns at step 101 moves as far in its first step as one that learns at step 1."""
    old, new = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    first = ScheduleFree([{"params": [old], "layer": -1}], lr=0.1, betas=(0.9, 0.95))
    first.train()
    run(first, old, [1.0] * 100, 0.1)
    second = ScheduleFree([{"params": [new, old], "layer": -1}], lr=0.1, betas=(0.9, 0.95))
    second.state[old] = first.state[old]
    to_average(first)
    second.take_up(first.scalars())
    to_training(second)
    assert [(group["params"][0] is old, group["k"]) for group in second.param_groups] == [(True, 100), (False, 0)]
    assert all(group["train_mode"] and group["layer"] == -1 for group in second.param_groups)
    old.grad, new.grad = torch.ones(2), torch.ones(2)
    second.step()
    assert second.state[new]["z"].tolist() == pytest.approx([0.9, 0.9])


def test_other_schedules_keep_adamw() -> None:
    learner = model(2)
    for name in ("constant", "cosine", "wsd"):
        optimizer = build_optimizer(parameter_groups(learner, 0.05), TrainConfig(lr_schedule=name))
        assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["fused"]
