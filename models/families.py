"""Which of timm's models can be cut between blocks, and how they are built. A model is a stack of timm's plain blocks
over patch tokens with absolute positions, class and register tokens in front where it has them; every other family is
refused by name with its reason. Stands before the encoder, which splits what is built here."""

from __future__ import annotations

from typing import Any

import timm
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from models.config import ModelConfig, model_name

PLAIN = ("vision_transformer", "deit")
"""timm's modules whose models can work."""

_POSITIONS = "which tokens that are masked or grouped would have to carry through the blocks"
_PYRAMID = "its tokens are merged from stage to stage, so one block's output has another shape than the next one's"
REASONS = {
    "beit": f"its attention adds a bias by relative position, {_POSITIONS}",
    "eva": f"it is timm's Eva, whose blocks take rotary positions beside the tokens, {_POSITIONS}",
    "vision_transformer_relpos": f"its attention adds a bias by relative position, {_POSITIONS}",
    "deepseek_vit": f"its attention rotates queries and keys by position, {_POSITIONS}",
    "gemma4_vit": f"its attention rotates queries and keys by position, {_POSITIONS}",
    "qwen3_vit": f"its attention rotates queries and keys by position, {_POSITIONS}",
    "vision_transformer_sam": "its attention works on windows of the whole grid, which a masked image does not have",
    "vision_transformer_hybrid": "its tokens are made by a convolutional network, whose patches overlap",
    "naflexvit": "it takes images of any size and shape, and the tokens of a cache are those of one size",
    "cait": "its class token enters behind the other blocks, in blocks of another kind",
    "convit": "its first blocks mix in attention by position on the whole grid",
    "xcit": "its blocks convolve over the whole grid, which a masked image does not have",
    "volo": "its first blocks attend within windows of the whole grid, at twice the resolution",
    "tnt": "its blocks run a second stream of tokens inside every patch",
    "crossvit": "it runs two streams of tokens of different patch sizes",
    "mlp_mixer": "its blocks mix tokens with weights for the whole grid, so they cannot run on some tokens alone",
    "vitamin": "its tokens are made by a convolutional network, whose patches overlap",
    "swin_transformer": _PYRAMID,
    "swin_transformer_v2": _PYRAMID,
    "swin_transformer_v2_cr": _PYRAMID,
    "hiera": _PYRAMID,
    "hieradet_sam2": _PYRAMID,
    "mvitv2": _PYRAMID,
    "pit": _PYRAMID,
    "pvt_v2": _PYRAMID,
    "twins": _PYRAMID,
    "nest": _PYRAMID,
    "coat": _PYRAMID,
    "levit": _PYRAMID,
    "davit": _PYRAMID,
    "gcvit": _PYRAMID,
    "maxxvit": _PYRAMID,
}
"""timm's module -> why its models do not work."""

REMEDY = "use a plain ViT such as vit_tiny, vit_small or vit_base"


class ModelError(ValueError):
    """A model that cannot be built as asked."""


def build_vit(config: ModelConfig) -> VisionTransformer:
    """timm's model without a head, its weights drawn from torch's global generator. Raises ModelError."""
    name = model_name(config.name)
    if config.image_size % config.patch_size:
        raise ModelError(f"model.patch_size={config.patch_size} does not divide model.image_size={config.image_size}")
    if reason := refusal(name):
        raise ModelError(f"model.name={config.name} cannot be used: {reason}; {REMEDY}")
    try:
        vit = timm.create_model(name, **timm_args(config))
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:  # the last for a tag that timm does not know
        raise ModelError(f"model.name={config.name} cannot be built: {error or type(error).__name__}") from error
    if part := _odd_part(vit):
        raise ModelError(f"model.name={config.name} cannot be used: it is built on {part}; {REMEDY}")
    assert isinstance(vit, VisionTransformer)
    return vit


def timm_args(config: ModelConfig) -> dict[str, Any]:
    """What timm is given beside the name; what the settings leave open is left to the named model."""
    asked = {
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "reg_tokens": config.registers,
    }
    return {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": 0,
        "global_pool": "",
        "class_token": config.class_token,
        "dynamic_img_size": False,
    } | {name: value for name, value in asked.items() if value}


def refusal(name: str) -> str:
    """Why a model of timm's cannot be cut between blocks, by its name alone; empty where it may be tried."""
    if not timm.is_model(name):
        return "timm knows no model of that name"
    for module, reason in REASONS.items():
        if timm.models.is_model_in_modules(name, [module]):
            return reason
    if not timm.models.is_model_in_modules(name, PLAIN):
        return "it is no stack of plain transformer blocks of one width"
    return "its distillation token has a head of its own beside the class token's" if "distilled" in name else ""


def _odd_part(vit: nn.Module) -> str:
    """The first part that is not timm's plain one; empty where there is none."""
    if type(vit) is not VisionTransformer:
        return f"{type(vit).__name__}, not on timm's plain VisionTransformer"
    if type(vit.patch_embed) is not PatchEmbed:
        return f"{type(vit.patch_embed).__name__}, not on timm's PatchEmbed"
    if odd := next((type(block).__name__ for block in vit.blocks if type(block) is not Block), ""):
        return f"{odd}, not on timm's plain Block"
    return "" if vit.pos_embed is not None else "positions other than absolute ones"
