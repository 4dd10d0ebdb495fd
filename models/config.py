"""Settings of what is computed. Free of torch, so that commands that only decide or explain start in a moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ModelConfig:
    """The vision transformer."""

    name: str = "vit_tiny"
    """vit_tiny, vit_small, vit_base, or the name of any plain ViT in timm."""
    weights: str = ""
    """Checkpoint to start stage 0 from; empty starts from scratch."""
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
class TeacherConfig:
    """Self-distillation: whose features hidden tokens are predicted from, where target.kind is teacher."""

    kind: Literal["frozen", "ema"] = "frozen"
    """frozen: the encoder at the end of stage 0, computed once and cached (stage 0 predicts pixels).
    ema: an exponential moving average of the encoder that learns, from the first step on."""
    block: int = 0
    """The target is the output of so many of the teacher's blocks; 0 takes all of them."""
    pairs: Literal["last", "same", "earlier", "later"] = "last"
    """What a head after block d predicts. last: the teacher's `block`; same: its block d; earlier, later: the block of
    the head before, or after (transitive distillation; the first, or the last, head predicts its own)."""
    momentum: float = 0.999
    """ema: share of the average that an optimiser step keeps."""
    ramp: int = 10
    """ema: step t keeps at most (1 + t) / (ramp + t), so that the untrained start is soon forgotten; 1 has no ramp."""

    def blocks(self, heads: Sequence[int], depth: int) -> tuple[int, ...]:
        """The teacher's block whose output each head predicts; `heads` are the blocks they stand after, from 1."""
        own = tuple(heads)
        chosen = {"last": (self.block or depth,) * len(own), "same": own, "earlier": own[:1] + own[:-1]}
        return chosen.get(self.pairs, own[1:] + own[-1:])

    def momentum_at(self, step: int) -> float:
        """The share of the average that is kept after optimiser step `step`, the first being 0."""
        return min(self.momentum, (1 + step) / (self.ramp + step))


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
