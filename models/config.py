"""Settings of what is computed. Free of torch, so that commands that only decide or explain start in a moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The vision transformer."""

    name: str = "vit_tiny"
    """vit_tiny, vit_small, vit_base, or the name of any plain ViT in timm."""
    weights: str = ""
    """Checkpoint file to start from (.safetensors, .pt, .pth, .bin; timm's names, MAE's and DINO's too); empty starts
    from scratch. Its positions take the place of the sin-cos ones. A stage 0 of 0 epochs takes it as it is."""
    image_size: int = 224
    """Side of the square input image, in pixels."""
    patch_size: int = 16
    """Side of a patch, in pixels; (image_size / patch_size)² is the number of tokens."""
    width: int = 0
    """Channels of a token; 0 takes the named model's own."""
    depth: int = 0
    """Number of blocks; 0 takes the named model's own."""
    heads: int = 0
    """Attention heads; 0 takes the named model's own."""
    class_token: bool = False
    """Put a class token before the patches, as checkpoints that have one need; nothing here is read from it."""
    registers: int = 0
    """Register tokens before the patches; 0 takes the named model's own."""
    attention: Literal["auto", "plain", "fused"] = "auto"
    """plain softmax(QKᵀ)V, torch's fused kernel, or auto: plain on a CPU, where it is faster, fused elsewhere."""

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Values of one RGB patch."""
        return 3 * self.patch_size**2


@dataclass(frozen=True)
class MaskConfig:
    """Which tokens are hidden from the encoder."""

    ratio: float = 0.75
    """Share of the tokens that is hidden."""
    groups: Literal[1, 2, 4] = 4
    """Token groups that pass the frozen blocks separately. 4: leak-free, masks fixed when the cache is built.
    2: leak-free, fresh masks. 1: full mode; it leaks, since visible features have attended to hidden tokens."""


@dataclass(frozen=True)
class TargetConfig:
    """What the decoder predicts for hidden tokens."""

    kind: Literal["pixels", "features", "hog"] = "pixels"
    """pixels: per-patch normalised; features: the learning blocks' input, layer-normalised (pixels in stage 0)."""


@dataclass(frozen=True)
class DecoderConfig:
    """The matching-shape decoder: its output has the shape of the encoder's input at the cut."""

    depth: int = 1
    """Blocks of the decoder; it runs on all tokens, so its cost bounds what skipping frozen blocks can save."""
    width: int = 0
    """Channels inside the decoder; 0 takes a third of the encoder's, as LocalMIM's decoders have."""
    heads: int = 0
    """Attention heads of the decoder; 0 takes one for every 32 channels."""

    def sizes(self, encoder_width: int) -> tuple[int, int]:
        """(width, heads) beside an encoder of a width."""
        width = self.width or 32 * max(1, round(encoder_width / 96))
        return width, self.heads or max(1, width // 32)


SIZES = {"vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12)}
"""Width, depth and heads of the models that have a short name."""


def model_name(name: str) -> str:
    """timm's name of a model."""
    return f"{name}_patch16_224" if name in SIZES else name
