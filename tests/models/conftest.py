"""Small models: 16 tokens, four blocks, width 24."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from models.config import DecoderConfig, HeadSpec, ModelConfig
from models.mim import MaskedModel
from models.multiscale import build_heads
from models.vit import build_encoder

SMALL = ModelConfig(image_size=16, patch_size=4, width=24, depth=4, heads=3)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        yield


@pytest.fixture(scope="session")
def small() -> Callable[..., ModelConfig]:
    """small(**changes) -> ModelConfig of 16 tokens."""
    return lambda **changes: replace(SMALL, **changes)


@pytest.fixture(scope="session")
def masked_model() -> Callable[..., MaskedModel]:
    """masked_model(cut, target="pixels", *more heads) -> MaskedModel, in train mode; a head at the end for a target."""

    def make(cut: int, target: str = "pixels", *before: HeadSpec) -> MaskedModel:
        encoder = build_encoder(SMALL, seed=0)
        specs = (*before, HeadSpec(4, target, matching=not before))
        heads = build_heads(specs, DecoderConfig(depth=1, width=12, heads=3), encoder, SMALL.patch_size, seed=0)
        return MaskedModel(encoder, heads, cut).train()

    return make


@pytest.fixture
def images() -> torch.Tensor:
    """(3, 3, 16, 16) uint8."""
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
