"""A training step never waits for the device that it runs on: it reads no value back, and copies no constant anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cache.buffers import Buffers
from models.batch import MaskedBatch
from models.config import DecoderConfig, HeadSpec, MaskConfig
from models.drop import DepthDrop
from models.teacher import EmaTeacher
from stages.config import DataConfig
from stages.images import ImageList
from stages.optim import build_optimizer, parameter_groups
from stages.sources import Inputs, LiveFeatures, LiveImages, Sampling, Source
from stages.train import Build, build_model, train_step
from tests.stages.loop import MODEL, TRAIN, parts

HOG = HeadSpec(2, "hog", 2.0, matching=False)
PIXELS = HeadSpec(3, "pixels")
TAUGHT = HeadSpec(3, "teacher", teacher=3)
STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "several heads, a share decoded": {"heads": (HOG, PIXELS), "share": 0.5},
    "weights and masks that change": {
        "heads": (replace(HOG, weight_end=2.0), PIXELS),
        "mask": MaskConfig(ratio=0.5, ratio_end=0.75, distance_power=1.0, distance_start=0.5),
    },
    "an average, depth dropped": {"heads": (TAUGHT,), "drop": DepthDrop(0, 0.5, 0.5, 20)},
    "behind blocks, four groups": {"cut": 1, "heads": (PIXELS,), "share": 0.5},
    "behind blocks, two groups": {"cut": 1, "mask": MaskConfig(groups=2, distance_power=1.0), "share": 0.5},
    "behind blocks, features": {"cut": 1, "mask": MaskConfig(groups=1), "heads": (HeadSpec(3, "features"),)},
}


def steps(name: str, images: ImageList, device: str = "cpu") -> Iterator[Any]:
    """Optimiser steps of 8 images, clipped, of two micro-batches each; one after the other, by calling what comes."""
    asked = {"cut": 0, "heads": (PIXELS,), "mask": MaskConfig(), "share": 1.0, "drop": None} | STEPS[name]
    heads, cut, averages = asked["heads"], asked["cut"], TAUGHT in asked["heads"]
    teacher = (lambda student: EmaTeacher(student, 0.9)) if averages else None
    build = Build(0, MODEL, DecoderConfig(depth=1, width=12, heads=3), heads, teacher, asked["drop"])
    model, (segment,) = build_model(build, cut, device).train(), parts(cut, entry=cut)
    how = Sampling(0, 8, DataConfig(), MODEL, asked["mask"], heads, asked["share"], 20, averages)
    source: Source = LiveFeatures(images, how, 2) if cut else LiveImages(images, how)
    train = replace(TRAIN, clip=1.0, accumulate=2, device=device)
    optimizer = build_optimizer(parameter_groups(model, 0.05), train)
    for step in range(segment.steps):
        inputs = source.load(segment, step)
        yield lambda: train_step(model, optimizer, source, inputs, train)  # noqa: B023


class Reads(TorchDispatchMode):
    """Writes down what a GPU's host would have to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "lift_fresh"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", STEPS)
def test_a_step_reads_nothing_back_and_makes_no_constant(name: str, colours: ImageList) -> None:
    """From the second step on; weights of losses that change are sent anew, which waits for nothing."""
    reads, taken = Reads(), steps(name, colours)
    next(taken)()
    for step in taken:
        with reads:
            step()
    weights = 3 if "weights" in name else 0
    assert reads.found == ["lift_fresh"] * weights


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="of a GPU")
def test_a_gpu_is_not_waited_for(name: str, colours: ImageList) -> None:
    taken = steps(name, colours, "cuda")
    next(taken)()
    try:
        for step in taken:
            torch.cuda.set_sync_debug_mode("error")
            step()
            torch.cuda.set_sync_debug_mode("default")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", [name for name in STEPS if "share" in STEPS[name]])
def test_the_share_that_is_decoded_is_of_the_tokens_that_count(name: str, colours: ImageList) -> None:
    """Of 16 tokens 4 are visible; 8 have been seen where blocks ran on two groups."""
    asked = {"heads": (PIXELS,), "mask": MaskConfig(), "cut": 0} | STEPS[name]
    heads, mask, cut = asked["heads"], asked["mask"], asked["cut"]
    how = Sampling(0, 8, DataConfig(), MODEL, mask, heads, 0.5, 20)
    build = Build(0, MODEL, DecoderConfig(depth=1, width=12, heads=3), heads)
    model, (segment,) = build_model(build, cut, "cpu"), parts(cut, entry=cut)
    source = LiveFeatures(colours, how, 2) if cut else LiveImages(colours, how)
    inputs = source.load(segment, 0)
    assert isinstance(inputs, Inputs)
    batch: MaskedBatch = source.mask(model, inputs)
    assert batch.ids_decode_BM is not None
    assert batch.ids_decode_BM.shape == (8, 4 if mask.groups == 2 else 6)
    assert (batch.scored_BL.gather(1, batch.ids_decode_BM) > 0).all(), "each counts"


@pytest.mark.parametrize("kind", [LiveImages, LiveFeatures])
def test_images_are_cut_into_the_rings_memory(kind: type, colours: ImageList) -> None:
    """Which is page-locked where a GPU copies from it; the same pixels as in memory of their own."""
    how, (segment,) = Sampling(0, 8, DataConfig(), MODEL, MaskConfig(), (PIXELS,)), parts(0)
    source = kind(colours, how) if kind is LiveImages else kind(colours, how, 2)
    ring, fresh = Buffers(), [source.load(segment, step).values for step in (0, 1)]
    size = MODEL.image_size
    for step in (0, 1):
        cut = source.load(segment, step, ring).values
        assert torch.equal(cut, fresh[step])
        assert cut.data_ptr() == ring.take("images", (8, 3, size, size), torch.uint8).data_ptr()
    assert not torch.equal(*fresh) and ring.nbytes == 8 * 3 * size**2
