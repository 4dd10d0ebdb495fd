"""Small models: 16 tokens, four blocks, width 24."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from models.config import DecoderConfig, ModelConfig
from models.decoder import build_decoder
from models.mim import MaskedModel
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
    """masked_model(cut, target_kind="pixels") -> MaskedModel, in train mode."""

    def make(cut: int, target_kind: str = "pixels") -> MaskedModel:
        encoder = build_encoder(SMALL, seed=0)
        decoder = build_decoder(DecoderConfig(depth=1, width=12, heads=3), encoder, SMALL.patch_values, seed=0)
        return MaskedModel(encoder, decoder, cut, target_kind).train()

    return make


@pytest.fixture
def images() -> torch.Tensor:
    """(3, 3, 16, 16) uint8."""
    return torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
