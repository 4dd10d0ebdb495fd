"""Settings of what is computed. Free of torch, so that commands that only decide or explain start in a moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
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
    ratio_end: float = 0.0
    """Share hidden at the end of the run, reached linearly from `ratio`; 0 keeps `ratio` throughout."""
    block: int = 1
    """Side, in tokens, of the squares that are hidden or kept as one: 1 is MAE's, 2 or more block-wise as SimMIM's."""
    distance_power: float = 0.0
    """A hidden token's loss weighs its distance to the nearest visible one to this power, mean 1; 0: all alike."""
    distance_start: float = 1.0
    """Share of an image's hidden tokens, nearest to a visible one first, that count at the start; all do at the end."""

    def ratio_at(self, progress: float) -> float:
        """The share hidden when `progress` (0..1) of the run is done."""
        return self.ratio + (self.ratio_end - self.ratio) * progress if self.ratio_end else self.ratio

    @property
    def changes(self) -> bool:
        """Whether masks depend on how much of the run is done."""
        return bool(self.ratio_end) or self.distance_start < 1


@dataclass(frozen=True)
class TargetConfig:
    """What the decoder predicts for hidden tokens."""

    kind: Literal["pixels", "features", "hog"] = "pixels"
    """pixels: per-patch normalised; hog: histograms of oriented gradients, 9 bins a channel, as LocalMIM's; features:
    the learning blocks' input, layer-normalised (pixels in stage 0, whose input is the image)."""


@dataclass(frozen=True)
class HeadsConfig:
    """Where and what the encoder is asked to reconstruct; without blocks by one matching-shape decoder at its end."""

    blocks: tuple[int, ...] = ()
    """After how many blocks a head reads the encoder, the last after all of them; LocalMIM's are [2,4,10,12]. On a
    cached stage the heads of frozen blocks disappear with their losses."""
    scales: tuple[float, ...] = ()
    """Side of each head's grid over that of the tokens: 4, 2, 1 or 0.5, LocalMIM's are [4,2,1,0.5]; empty: all 1."""
    targets: tuple[Literal["pixels", "features", "hog"], ...] = ()
    """Target of each head; empty: target.kind for all."""
    weights: str = "equal"
    """Weights of the heads' losses: equal (1 each), a list such as 4,3,2,1 or 1/4,1/3,1/2,1, or start:end, for instance
    4,3,2,1:1,1,1,1, which goes linearly from one list to the other over the run."""


@dataclass(frozen=True)
class HeadSpec:
    """One head: what it reads, what it predicts, how much its loss weighs."""

    block: int
    """Blocks that have run on what it reads."""
    target: str
    scale: float = 1.0
    """Side of its grid over that of the tokens."""
    weight: float = 1.0
    weight_end: float = 1.0
    matching: bool = True
    """Whether its decoder gives features of the encoder's width first, from which an image target is read."""

    @property
    def name(self) -> str:
        """`block12_pixels`, with the scale where it is not 1."""
        scale = {4.0: "_x4", 2.0: "_x2", 0.5: "_half"}.get(self.scale, "")
        return f"block{self.block}_{self.target}{scale}"

    def weight_at(self, progress: float) -> float:
        """The weight of its loss when `progress` (0..1) of the run is done."""
        return self.weight + (self.weight_end - self.weight) * progress


SCALES = (4.0, 2.0, 1.0, 0.5)


def head_specs(heads: HeadsConfig, target: TargetConfig, depth: int) -> tuple[HeadSpec, ...]:
    """The heads that the settings ask for, over an encoder of `depth` blocks. Raises ValueError for bad weights."""
    if not heads.blocks:
        return (HeadSpec(depth, target.kind),)
    count = len(heads.blocks)
    kinds = heads.targets or (target.kind,) * count
    start, end = loss_weights(heads.weights, count)
    rows = zip(heads.blocks, kinds, heads.scales or (1.0,) * count, start, end, strict=True)
    return tuple(HeadSpec(*row, matching=row[1] not in IMAGE_TARGETS) for row in rows)


IMAGE_TARGETS = ("pixels", "hog")
"""Targets that are made of the image alone."""


def learning_heads(specs: Iterable[HeadSpec], cut: int, entry: int | None = None) -> tuple[HeadSpec, ...]:
    """The heads that can learn at a cut: those behind it.

    entry: the block at which a step's inputs enter, the cut itself unless blocks before it freeze in place. At 0 inputs
    are images and there are no features yet: heads that ask for them predict pixels.
    """
    features = cut if entry is None else entry
    behind = (spec for spec in specs if spec.block > cut)
    return tuple(
        spec if features or spec.target in IMAGE_TARGETS else replace(spec, target="pixels") for spec in behind
    )


def loss_weights(text: str, count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The weights at the start and at the end that `heads.weights` asks for. Raises ValueError saying what is wrong."""
    if text == "equal":
        return (1.0,) * count, (1.0,) * count
    start, _, end = text.partition(":")
    lists = []
    for part in (start, end or start):
        try:
            found = tuple(float(Fraction(word)) for word in part.split(","))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"{text!r} is neither equal nor numbers such as 4,3,2,1 or 1/4,1/3,1/2,1") from None
        if len(found) != count or min(found) < 0 or not sum(found):
            raise ValueError(f"{part!r} is not {count} weights, one a head, none below 0 and not all 0")
        lists.append(found)
    return lists[0], lists[1]


@dataclass(frozen=True)
class DecoderConfig:
    """The matching-shape decoder: its output has the shape of the encoder's input at the cut."""

    depth: int = 1
    """Blocks of the decoder; it runs on all tokens, so its cost bounds what skipping frozen blocks can save."""
    width: int = 0
    """Channels inside the decoder; 0 takes a third of the encoder's, as LocalMIM's decoders have."""
    heads: int = 0
    """Attention heads of the decoder; 0 takes one for every 32 channels."""
    share: float = 1.0
    """Share of the hidden tokens that is decoded and scored, drawn afresh at every step: 1, 0.5 or 0.25 for instance.
    Less makes the decoder cheaper, which otherwise bounds what skipping frozen blocks can save."""

    def sizes(self, encoder_width: int) -> tuple[int, int]:
        """(width, heads) beside an encoder of a width."""
        width = self.width or 32 * max(1, round(encoder_width / 96))
        return width, self.heads or max(1, width // 32)


SIZES = {"vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12)}
"""Width, depth and heads of the models that have a short name."""


def model_name(name: str) -> str:
    """timm's name of a model."""
    return f"{name}_patch16_224" if name in SIZES else name
