"""The same global batches whatever the number of ranks and loader threads: what the ranks load, put together, is what
one rank loads, to the bit, for every source; and the same again after stopping in the middle of an epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cache import open_cache
from cache.errors import CacheError
from cache.loader import prefetch
from cache.order import Blocks
from cache.rank import Rank
from models.config import DecoderConfig, HeadSpec, MaskConfig
from models.drop import DepthDrop
from models.learner import Learner
from models.vit import Encoder
from stages.checkpoint import apply_tensors, read_state
from stages.config import TrainConfig
from stages.finetune import CachedPrefix, LiveViews
from stages.images import ImageList
from stages.ranks import of_rank
from stages.segment import Segment
from stages.sources import CachedFeatures, LiveFeatures, LiveImages, Sampling
from stages.train import Build, build_model, loader, train_arm
from tests.stages.loop import BUILD, HEADS, MODEL, STATE, StopAfter, arm, hooks, parts
from tests.stages.test_stages_finetune import IMAGES as LABELLED
from tests.stages.test_stages_finetune import classifier, lessons, prefix_cache
from tests.stages.test_stages_prefix import DATA, IMAGES, SEGMENT, built, encoder, weights  # noqa: F401
from tests.stages.test_stages_prefix import MODEL as PREFIXED

RANKS = [1, 2, 4]


def ranks_of(many: int) -> list[Rank]:
    return [Rank(rank, many) for rank in range(many)]


def joined(inputs: list[Any], order: np.ndarray | None = None) -> dict[str, Tensor]:
    """Every tensor of the ranks' inputs one after the other, or in the order of the global batch's places."""
    found: dict[str, list[Tensor]] = {}
    for one in inputs:
        for name, value in vars(one).items():
            if isinstance(value, Tensor):
                found.setdefault(name, []).append(value)
            if name == "teachers":
                for block, tensor in value.items():
                    found.setdefault(f"teacher {block}", []).append(tensor)
    whole = {name: torch.cat(values) for name, values in found.items()}
    return whole if order is None else {name: value[np.argsort(order)] for name, value in whole.items()}


def assert_equal(ours: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    assert ours.keys() == whole.keys() and len(whole) >= 2
    for name, value in whole.items():
        assert torch.equal(ours[name], value), name


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory, weights: Path, encoder: Encoder) -> dict[int, Any]:  # noqa: F811
    """Caches of cut 3 by their groups."""
    root = tmp_path_factory.mktemp("shelf")
    return {groups: open_cache(built(root / f"{groups}", weights, encoder, 3, groups)) for groups in (1, 2, 4)}


MASKS = {
    "full": MaskConfig(groups=1),
    "full, block-wise, growing": MaskConfig(groups=1, block=2, ratio_end=0.5),
    "pooled": MaskConfig(groups=2),
    "grouped": MaskConfig(groups=4),
}


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("target", ["pixels", "features", "teacher"])
@pytest.mark.parametrize("mask", MASKS)
def test_ranks_together_load_what_one_loads(shelf: dict[int, Any], mask: str, target: str, ranks: int) -> None:
    head = HeadSpec(4, target, matching=True, teacher=3 if target == "teacher" else 0)  # type: ignore[arg-type]
    one = Sampling(5, 8, DATA, PREFIXED, MASKS[mask], (head,), 0.5, 20)
    cache, teachers = shelf[MASKS[mask].groups], {3: shelf[1]} if target == "teacher" else {}
    for step in range(3):
        segment = replace(SEGMENT, first_epoch=step)  # another view, then another group

        def sources(how: Sampling) -> list[Any]:
            cached = CachedFeatures(cache, how, IMAGES, teachers)
            return [LiveImages(IMAGES, how), LiveFeatures(IMAGES, how, 2), cached]

        for number, whole in enumerate(source.load(segment, step) for source in sources(one)):
            shared = [sources(replace(one, rank=rank))[number].load(segment, step) for rank in ranks_of(ranks)]
            assert {part.values.shape[0] for part in shared} == {8 // ranks}
            assert_equal(joined(shared), joined([whole]))
            assert {(part.step, part.progress, part.group) for part in shared} == {
                (whole.step, whole.progress, whole.group)
            }


def taken(source: Any, segment: Segment, ranks: int, steps: range, threads: int) -> Iterator[dict[str, Tensor]]:
    """The global batches of some steps as the ranks' loaders hand them out, each of which has made others ahead when it
    is stopped."""
    train, rest = TrainConfig(loader_threads=threads, prefetch=3, device="cpu"), range(steps.start, segment.steps)
    with ExitStack() as stack:
        loaders = [
            stack.enter_context(loader(of_rank(source, rank, 1), segment, rest, train, math.inf))
            for rank in ranks_of(ranks)
        ]
        for _ in steps:
            yield joined([next(one) for one in loaders])


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("target", ["pixels", "features"])
@pytest.mark.parametrize("mask", MASKS)
def test_cached_batches_are_the_same_after_stops_within_an_epoch_and_with_other_ranks(
    shelf: dict[int, Any], mask: str, target: str, threads: int
) -> None:
    """Two epochs of 6 steps: one rank stops after 2, two after 5, four after 8, and one ends them."""
    segment = replace(SEGMENT, epochs=2, steps=12, steps_per_epoch=6)
    head = HeadSpec(4, target, matching=True)  # type: ignore[arg-type]
    how = Sampling(5, 4, DATA, PREFIXED, MASKS[mask], (head,), 0.5, 20)
    source = CachedFeatures(shelf[MASKS[mask].groups], how, IMAGES)
    straight = [joined([source.load(segment, step)]) for step in range(12)]
    goes = [(1, range(2)), (2, range(2, 5)), (4, range(5, 8)), (1, range(8, 12))]
    found = [batch for ranks, steps in goes for batch in taken(source, segment, ranks, steps, threads)]
    assert len(found) == 12 and not np.array_equal(straight[0]["values"], straight[1]["values"])
    for ours, theirs in zip(found, straight, strict=True):
        assert ours.keys() == theirs.keys() >= {"values", "noise", "ids_BL", "prefix_BSD", "decode_noise"}
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_a_micro_batch_of_all_ranks_is_that_of_one(ranks: int) -> None:
    how = Sampling(5, 8, DATA, PREFIXED, MaskConfig(), (HeadSpec(4, "pixels"),), parts=2)
    whole = LiveImages(IMAGES, how).load(SEGMENT, 1).split(2)
    shared = [LiveImages(IMAGES, replace(how, rank=rank)).load(SEGMENT, 1).split(2) for rank in ranks_of(ranks)]
    for micro in range(2):
        assert_equal(joined([inputs[micro] for inputs in shared]), joined([whole[micro]]))


@pytest.mark.parametrize("threads", [1, 3])
def test_loader_threads_change_nothing(threads: int) -> None:
    source = LiveImages(IMAGES, Sampling(5, 8, DATA, PREFIXED, MaskConfig(), (HeadSpec(4, "pixels"),)))
    with prefetch(lambda step: source.load(SEGMENT, step), range(3), threads, 3) as batches:
        for step, inputs in enumerate(batches):
            assert_equal(joined([inputs]), joined([source.load(SEGMENT, step)]))


def test_blocks_of_shards_reach_every_source() -> None:
    blocks, segment = Blocks(4, 1), replace(SEGMENT, cut=0)
    how = Sampling(5, 8, DATA, PREFIXED, MaskConfig(), (HeadSpec(4, "pixels"),), blocks=blocks)
    for rows in (how.rows(segment, 0, 24), replace(lessons(), blocks=blocks).rows(segment, 0, 24)):
        assert len({row // 4 for row in rows.tolist()}) == 2, "8 or 6 rows of shards of 4"


@pytest.mark.parametrize("batch", [8, 9])
def test_a_batch_that_the_ranks_do_not_divide_is_refused(batch: int) -> None:
    how = Sampling(5, batch, DATA, PREFIXED, MaskConfig(), (HeadSpec(4, "pixels"),), rank=Rank(1, 3))
    if batch == 9:
        assert LiveImages(IMAGES, how).load(SEGMENT, 0).values.shape[0] == 3
        return
    with pytest.raises(CacheError, match="a batch of 8 is not divisible into 1 equal parts for each of 3 ranks"):
        LiveImages(IMAGES, how).load(SEGMENT, 0)


# --- fine-tuning ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def behind_blocks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = classifier(cut=2, class_token=True)
    return open_cache(prefix_cache(tmp_path_factory.mktemp("behind") / "a", model, class_token=True))


@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("mix", [(0.8, 0.0), (0.0, 1.0), (0.0, 0.0)])
@pytest.mark.parametrize("cached", [False, True])
def test_ranks_together_mix_what_one_mixes(
    behind_blocks: Any, mix: tuple[float, float], ranks: int, accumulate: int, cached: bool
) -> None:
    asked = lessons(batch_size=24, accumulate=accumulate, mixup=mix[0], cutmix=mix[1])
    segment = replace(SEGMENT, steps_per_epoch=1)

    def source(rank: Rank) -> Any:
        how = replace(asked, rank=rank)
        return CachedPrefix(behind_blocks, how) if cached else LiveViews(LABELLED, how)

    for step in range(3):
        whole = source(Rank()).load(segment, step)
        shared = [source(rank).load(segment, step) for rank in ranks_of(ranks)]
        places = np.concatenate([part.lessons.places for part in shared])
        assert_equal(joined(shared, places), joined([whole]))
        ours, theirs = joined([part.mixed() for part in shared], places), joined([whole.mixed()])
        assert ours.keys() == theirs.keys()
        assert (theirs["shares_BK"].amax(dim=1) > 0.9).all() == (mix == (0.0, 0.0)), "mixed where asked"
        assert torch.equal(ours["values"], theirs["values"])
        # Two terms of a sum over the batch, which a product of matrices may round in another order.
        torch.testing.assert_close(ours["shares_BK"], theirs["shares_BK"], rtol=0.0, atol=1e-7)
        if cached:
            torch.testing.assert_close(ours["prefix_BRD"], theirs["prefix_BRD"], rtol=1e-6, atol=1e-6)


# --- training ---------------------------------------------------------------------------------------------------------


def ranks_step(model: Learner, optimizer: Any, sources: list[LiveImages], segment: Segment, step: int) -> float:
    """One optimiser step of several ranks by hand: the mean of their gradients. Returns the mean of their losses."""
    optimizer.zero_grad()
    losses = []
    for source in sources:
        inputs = source.load(segment, step)
        loss = model(source.mask(model, inputs)).sum() / len(sources)
        loss.backward()
        losses.append(loss.item())
    optimizer.step()
    return sum(losses)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_run_stopped_in_the_middle_of_an_epoch_goes_on_with_other_ranks(
    tmp_path: Path, colours: ImageList, ranks: int
) -> None:
    """One rank stops after 6 of 8 steps, 2 into its second epoch; so many ranks train the rest as one would have."""
    images, segments = colours.only(range(32)), parts(0, epochs=2)
    _, straight = train_arm(arm(tmp_path / "straight", images, segments), hooks())
    once = arm(tmp_path / "stopped", images, segments)
    train_arm(once, hooks(StopAfter(5)))
    _, progress, tensors = read_state(tmp_path / "stopped" / STATE)
    assert progress.step == 6 and "rank" not in json.dumps(vars(progress), default=vars)
    (segment,) = segments
    model = once.make(segment)
    optimizer = once.optimizer(model)
    apply_tensors(model, optimizer, tensors)
    one = once.source(segment)
    assert isinstance(one, LiveImages)
    sources = [replace(one, sampling=replace(one.sampling, rank=rank)) for rank in ranks_of(ranks)]
    for step in (6, 7):
        once.rates.apply(optimizer, step)
        ranks_step(model, optimizer, sources, segment, step)
    theirs = straight.state_dict()
    for name, value in model.state_dict().items():
        # The gradient of the keys' bias is 0 but for rounding, which Adam turns into whole steps.
        if not name.endswith("attn.qkv.bias"):
            torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mask", [MaskConfig(groups=1), MaskConfig(groups=1, distance_power=1.0, distance_start=0.5)])
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_mean_of_the_ranks_losses_is_the_batch_s(colours: ImageList, mask: MaskConfig, share: float) -> None:
    """Weights are normalised by sums that are alike for every image, so that equal slices are averaged plainly."""
    model = build_model(BUILD, 0, "cpu")
    one = LiveImages(colours, Sampling(0, 8, DATA, MODEL, mask, HEADS, share, 20))
    want = model(one.mask(model, one.load(parts(0)[0], 0)))
    for ranks in RANKS[1:]:
        shared = [replace(one, sampling=replace(one.sampling, rank=rank)) for rank in ranks_of(ranks)]
        found = [model(source.mask(model, source.load(parts(0)[0], 0))) for source in shared]
        torch.testing.assert_close(torch.stack(found).mean(dim=0), want, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("parts_of_step", [1, 2])
@pytest.mark.parametrize("ranks", RANKS[1:])
def test_stochastic_depth_drops_the_same_samples_whoever_has_them(
    colours: ImageList, ranks: int, parts_of_step: int
) -> None:
    def latents(rank: Rank) -> list[Tensor]:
        drop = DepthDrop(0, 0.6, 0.0, 20, rank.rank, rank.ranks)
        build = Build(0, MODEL, DecoderConfig(depth=1, width=12, heads=3), HEADS, drop=drop)
        model = build_model(build, 0, "cpu").train()
        how = Sampling(0, 8, DATA, MODEL, MaskConfig(), HEADS, 1.0, 20, rank=rank, parts=parts_of_step)
        source = LiveImages(colours, how)
        with model.dropping(3), torch.no_grad():
            micros = source.load(parts(0)[0], 3).split(parts_of_step)
            return [model.encode(source.mask(model, micro).visible_BKD)[3] for micro in micros]

    whole, shared = latents(Rank()), [latents(rank) for rank in ranks_of(ranks)]
    for micro in range(parts_of_step):
        found = torch.cat([one[micro] for one in shared])
        torch.testing.assert_close(found, whole[micro], rtol=1e-4, atol=1e-5)
    plain = build_model(BUILD, 0, "cpu").train()
    source = LiveImages(colours, Sampling(0, 8, DATA, MODEL, MaskConfig(), HEADS, 1.0, 20))
    with torch.no_grad():
        kept = plain.encode(source.mask(plain, source.load(parts(0)[0], 3)).visible_BKD)[3]
    assert not torch.allclose(kept, torch.cat(whole), atol=1e-3), "something was dropped"


@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("ranks", RANKS[1:])
@pytest.mark.parametrize("mixup", [0.8, 0.0])
def test_fine_tuning_drops_the_same_samples_whoever_has_them(mixup: float, ranks: int, accumulate: int) -> None:
    asked, segment = lessons(batch_size=8 * accumulate, accumulate=accumulate, mixup=mixup, cutmix=0.0), SEGMENT

    def logits(rank: Rank) -> tuple[np.ndarray, Tensor]:
        model, how = classifier().train(), replace(asked, rank=rank)
        model.drop = DepthDrop(0, 0.6, 0.0, 20, rank.rank, rank.ranks, paired=how.config.mixes)
        model.drop.install(model.encoder)
        source = LiveViews(LABELLED, how)
        micros = source.load(segment, 0).split(accumulate)
        with model.dropping(3), torch.no_grad():
            found = [next(model.logits(source.mask(model, micro).tokens_BLD)) for micro in micros]
        return how.places, torch.cat(found)

    _, whole = logits(Rank())
    for places, found in map(logits, ranks_of(ranks)):
        torch.testing.assert_close(found, whole[places], rtol=1e-4, atol=1e-5)
