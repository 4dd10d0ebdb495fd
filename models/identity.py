"""What a model is, by name and sizes. Torch is imported only for a model whose sizes this project does not know."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from models.config import SIZES, ModelConfig, model_name


def model_identity(config: ModelConfig) -> dict[str, str | int]:
    """What a model is: timm's name, width, depth, heads, prefix, and how it takes images where that is not ImageNet's.
    Only a model without a short name is built to know."""
    return dict(_identity(config))


@lru_cache(maxsize=16)
def _identity(config: ModelConfig) -> dict[str, str | int]:
    if config.name in SIZES:
        sizes, prefix = SIZES[config.name], config.class_token + config.registers
    else:
        import torch

        from models.families import build_vit

        with torch.device("meta"):  # shapes without values: a large model takes as long as a small one
            vit = build_vit(config)
        attention: Any = vit.blocks[0].attn
        sizes, prefix = (vit.embed_dim, len(vit.blocks), attention.num_heads), vit.num_prefix_tokens
    asked = (config.width, config.depth, config.heads)
    width, depth, heads = (want or own for want, own in zip(asked, sizes, strict=True))
    found: dict[str, str | int]
    found = {"model": model_name(config.name), "width": width, "depth": depth, "heads": heads, "prefix": prefix}
    return found | ({"normalisation": config.normalisation} if config.normalisation else {})
