"""Dropped depth: both papers' rates by hand, skipped blocks that do not run, and nothing frozen dropped."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from models.config import ModelConfig
from models.drop import (
    BranchDrop,
    DepthDrop,
    drop_path_rates,
    keep_probability,
    kept_share,
    skipped_blocks,
)
from models.vit import Encoder, build_encoder

Small = Callable[..., ModelConfig]


@pytest.fixture
def encoder(small: Small) -> Encoder:
    return build_encoder(small(), seed=0)


def output(encoder: Encoder, drop: DepthDrop | None, step: int, tokens: Tensor) -> Tensor:
    with drop.during(encoder, step) if drop else nullcontext():
        return encoder.run(tokens, 0, encoder.depth)


def blocks_run(encoder: Encoder, work: Callable[[], object]) -> list[int]:
    """The blocks whose forward is called while `work` is done."""
    found: list[int] = []
    handles = [
        block.register_forward_hook(lambda *_, index=index: found.append(index))
        for index, block in enumerate(encoder.vit.blocks)
    ]
    work()
    for handle in handles:
        handle.remove()
    return found


def test_stochastic_depth_rises_linearly_to_its_rate() -> None:
    assert drop_path_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert drop_path_rates(0.3, 1) == [0.0]


def test_progressive_dropping_s_schedule_is_the_paper_s() -> None:
    # theta(t) = (1 - 0.5) exp(-100 t / 1000) + 0.5
    assert kept_share(0, 1000, 0.5) == 1.0
    assert kept_share(10, 1000, 0.5) == pytest.approx(0.5 * math.exp(-1) + 0.5)
    assert kept_share(50, 1000, 0.5) == pytest.approx(0.5 + 0.5 * 0.006737947)
    assert kept_share(1000, 1000, 0.5) == pytest.approx(0.5)
    # The paper subtracts (1 - theta) / L from 1 once a block.
    kept, want = [keep_probability(block, 4, 0.6) for block in range(4)], [1.0, 0.9, 0.8, 0.7]
    assert kept == pytest.approx(want)


def test_blocks_are_skipped_as_often_as_asked_and_frozen_ones_never() -> None:
    keeps = [1.0, 0.9, 0.6, 0.3]
    steps = [skipped_blocks(5, step, keeps, 0) for step in range(4000)]
    for block, keep in enumerate(keeps):
        share = sum(block in skipped for skipped in steps) / 4000
        assert share == pytest.approx(1 - keep, abs=4 * math.sqrt(0.25 / 4000))
    assert all(skipped_blocks(5, step, keeps, 3) == steps[step] & {3} for step in range(100))
    assert steps[:50] == [skipped_blocks(5, step, keeps, 0) for step in range(50)]
    assert steps[:50] != [skipped_blocks(6, step, keeps, 0) for step in range(50)]


def test_a_skipped_block_does_not_run(encoder: Encoder) -> None:
    drop = DepthDrop(seed=0, drop_path=0.0, layer_drop=0.9, total_steps=10)
    drop.install(encoder)
    tokens = torch.randn(2, 16, 24)
    ran = [blocks_run(encoder, lambda step=step: output(encoder, drop, step, tokens)) for step in range(3, 40)]
    wants = [set(range(4)) - skipped_blocks(0, s, drop.keep_probabilities(4, s), 0) for s in range(3, 40)]
    assert [set(found) for found in ran] == wants and len({len(found) for found in ran}) >= 3
    assert all(found == sorted(set(found)) for found in ran)
    assert blocks_run(encoder, lambda: encoder.run(tokens, 0, 4)) == [0, 1, 2, 3]


def test_what_runs_beside_skipped_blocks_is_scaled_by_one_over_its_keep_probability(encoder: Encoder) -> None:
    drop, tokens = DepthDrop(0, 0.0, 0.9, 10), torch.randn(2, 16, 24)
    drop.install(encoder)
    for step in (5, 9):
        skipped, want = skipped_blocks(0, step, drop.keep_probabilities(4, step), 0), tokens
        for index, block in enumerate(encoder.vit.blocks):
            if index not in skipped:
                gain = 1 / (1 - index / 4 * (1 - kept_share(step, 10, 0.9)))
                want = want + gain * block.attn(block.norm1(want))
                want = want + gain * block.mlp(block.norm2(want))
        torch.testing.assert_close(output(encoder, drop, step, tokens), want)


def test_skipped_blocks_have_no_gradient_and_the_others_have(encoder: Encoder) -> None:
    drop = DepthDrop(0, 0.0, 0.9, 10)
    drop.install(encoder)
    step = next(s for s in range(100) if skipped_blocks(0, s, drop.keep_probabilities(4, s), 0) == {2})
    output(encoder, drop, step, torch.randn(2, 16, 24)).square().sum().backward()
    for index, block in enumerate(encoder.vit.blocks):
        assert all((p.grad is None) == (index == 2) for p in block.parameters())


def test_drop_path_drops_whole_branches_of_samples_and_scales_the_rest(encoder: Encoder) -> None:
    drop, tokens = DepthDrop(0, 0.5, 0.0, 10), torch.ones(400, 1, 24)
    drop.install(encoder)
    with drop.during(encoder, 0):
        dropped = [block.drop_path1(tokens) for block in encoder.vit.blocks]
    assert torch.equal(dropped[0], tokens)
    for block, branch in enumerate(dropped):
        keep = 1 - 0.5 * block / 3
        values = branch[:, 0, 0]
        assert torch.equal(branch, values[:, None, None].expand_as(branch))
        torch.testing.assert_close(values[values > 0], torch.full_like(values[values > 0], 1 / keep))
        assert float((values > 0).float().mean()) == pytest.approx(keep, abs=0.1)


@pytest.mark.parametrize("paired", [False, True])
def test_an_evaluation_on_several_ranks_takes_batches_of_any_size_as_they_are(encoder: Encoder, paired: bool) -> None:
    DepthDrop(0, 0.5, 0.0, 10, rank=1, ranks=2, paired=paired).install(encoder.eval())
    tokens = torch.randn(3, 16, 24)
    assert all(torch.equal(block.drop_path1(tokens), tokens) for block in encoder.vit.blocks)


def test_draws_are_a_function_of_seed_and_step_and_leave_the_generator_alone(encoder: Encoder) -> None:
    drop, tokens = DepthDrop(3, 0.5, 0.5, 10), torch.randn(8, 16, 24)
    drop.install(encoder)
    before = torch.get_rng_state()
    first = output(encoder, drop, 4, tokens)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(output(encoder, drop, 4, tokens), first)
    assert not torch.equal(output(encoder, drop, 5, tokens), first)
    assert not torch.equal(output(encoder, DepthDrop(4, 0.5, 0.5, 10), 4, tokens), first)


def test_frozen_blocks_and_evaluation_drop_nothing(encoder: Encoder) -> None:
    plain, tokens, drop = copy.deepcopy(encoder), torch.randn(8, 16, 24), DepthDrop(0, 0.9, 0.9, 10)
    encoder.freeze(3)
    drop.install(encoder)
    for step in range(5, 10):
        with drop.during(encoder, step):
            assert torch.equal(encoder.run(tokens, 0, 3), plain.run(tokens, 0, 3))
            assert encoder.skipped <= {3}
    assert encoder.training and torch.equal(encoder.run(tokens, 0, 4), plain.run(tokens, 0, 4))
    encoder.eval()
    with drop.during(encoder, 9):
        encoder.skipped = frozenset()
        assert torch.equal(encoder.run(tokens, 0, 4), plain.run(tokens, 0, 4))


def test_without_rates_nothing_is_installed(encoder: Encoder) -> None:
    drop, tokens = DepthDrop(0, 0.0, 0.0, 10), torch.randn(2, 16, 24)
    drop.install(encoder)
    assert not any(isinstance(module, BranchDrop) for module in encoder.modules())
    assert torch.equal(output(encoder, drop, 7, tokens), output(encoder, None, 7, tokens))


def test_parameters_keep_their_names(encoder: Encoder) -> None:
    names = list(encoder.state_dict())
    DepthDrop(0, 0.1, 0.1, 10).install(encoder)
    assert list(encoder.state_dict()) == names
