"""What a model is, by name and sizes. Torch is imported only for a model whose sizes this project does not know."""

from __future__ import annotations

from typing import Any

from models.config import SIZES, ModelConfig, model_name


def model_identity(config: ModelConfig) -> dict[str, str | int]:
    """What a model is: timm's name, width, depth, heads. Only a model without a short name has to be built to know."""
    if config.name in SIZES:
        sizes = SIZES[config.name]
    else:
        from models.vit import build_encoder

        encoder = build_encoder(config, seed=0)
        attention: Any = encoder.vit.blocks[0].attn
        sizes = encoder.width, encoder.depth, attention.num_heads
    asked = (config.width, config.depth, config.heads)
    width, depth, heads = (want or own for want, own in zip(asked, sizes, strict=True))
    return {"model": model_name(config.name), "width": width, "depth": depth, "heads": heads}
