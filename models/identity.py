"""What a model is, by name and sizes. Torch is imported only for a model whose sizes this project does not know."""

from __future__ import annotations

from typing import Any

from models.config import SIZES, ModelConfig, model_name


def model_identity(config: ModelConfig) -> dict[str, str | int]:
    """What a model is: timm's name, width, depth, heads, prefix. Only a model without a short name is built to know."""
    if config.name in SIZES:
        sizes, prefix = SIZES[config.name], config.class_token + config.registers
    else:
        from models.vit import build_encoder

        encoder = build_encoder(config, seed=0)
        attention: Any = encoder.vit.blocks[0].attn
        sizes, prefix = (encoder.width, encoder.depth, attention.num_heads), encoder.num_prefix
    asked = (config.width, config.depth, config.heads)
    width, depth, heads = (want or own for want, own in zip(asked, sizes, strict=True))
    return {"model": model_name(config.name), "width": width, "depth": depth, "heads": heads, "prefix": prefix}
