"""Settings of what is computed. Free of torch, so that commands that only decide or explain start in a moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Literal

RGB = tuple[float, float, float]
Normalisation = tuple[RGB, RGB]
"""Mean and standard deviation."""
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelConfig:
    """The vision transformer."""

    name: str = "vit_tiny"
    """vit_tiny, vit_small, vit_base, or the name of any plain ViT in timm."""
    weights: str = ""
    """Checkpoint file to start from, or its URL (.safetensors, .pt, .pth, .bin; timm's names, MAE's and DINO's too);
    empty starts from scratch. Its positions take the place of the sin-cos ones. A stage 0 of 0 epochs takes it as it
    is."""
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
    """Put a class token before the patches, as checkpoints that have one need; only finetune.pool=token reads it."""
    registers: int = 0
    """Register tokens before the patches; 0 takes the named model's own."""
    mean: RGB = IMAGENET_MEAN
    """What is taken off red, green and blue, each 0..1, before the encoder; ImageNet's. Checkpoints know but their own:
    MAE's and DINO's ImageNet's, timm's augreg ones and SigLIP [0.5,0.5,0.5]. Pixel and HOG targets keep ImageNet's."""
    std: RGB = IMAGENET_STD
    """What the three are divided by then; ImageNet's."""
    attention: Literal["auto", "plain", "fused"] = "auto"
    """plain softmax(QKᵀ)V, torch's fused kernel, or auto: plain on a CPU up to 256 tokens, where it is faster, else
    fused."""

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def patch_values(self) -> int:
        """Values of one RGB patch."""
        return 3 * self.patch_size**2

    @property
    def normalisation(self) -> str:
        """What a cache says of mean and std; nothing where they are ImageNet's, as in caches before the setting."""
        own = (self.mean, self.std)
        return "" if own == (IMAGENET_MEAN, IMAGENET_STD) else normalisation_words(*own)


def normalisation_words(mean: RGB, std: RGB) -> str:
    """`mean 0.5,0.5,0.5 std 0.5,0.5,0.5`."""
    return f"mean {','.join(map(str, mean))} std {','.join(map(str, std))}"


def normalisation_settings(mean: RGB, std: RGB) -> str:
    """What gives a run another one, as the command line takes it."""
    return f'SET="model.mean=[{",".join(map(str, mean))}] model.std=[{",".join(map(str, std))}]"'

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

    kind: Literal["pixels", "features", "hog", "teacher"] = "pixels"
    """pixels: per-patch normalised; hog: histograms of oriented gradients, 9 bins a channel, as LocalMIM's; features:
    the learning blocks' input, layer-normalised (pixels in stage 0, whose input is the image); teacher: what `teacher`
    makes of the whole view, layer-normalised."""


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
    """ema: share of the average that an optimiser step keeps, the same from the first step on: an average that starts
    by following closely collapses (on the sample, kept shares rising from 0.1, within 30 steps; 0.999 does not)."""

    def blocks(self, heads: Sequence[int], depth: int) -> tuple[int, ...]:
        """The teacher's block whose output each head predicts; `heads` are the blocks they stand after, from 1."""
        own = tuple(heads)
        chosen = {"last": (self.block or depth,) * len(own), "same": own, "earlier": own[:1] + own[:-1]}
        return chosen.get(self.pairs, own[1:] + own[-1:])


@dataclass(frozen=True)
class HeadsConfig:
    """Where and what the encoder is asked to reconstruct; without blocks by one matching-shape decoder at its end."""

    blocks: tuple[int, ...] = ()
    """After how many blocks a head reads the encoder, the last after all of them; LocalMIM's are [2,4,10,12]. On a
    cached stage the heads of frozen blocks disappear with their losses."""
    scales: tuple[float, ...] = ()
    """Side of each head's grid over that of the tokens: 4, 2, 1 or 0.5, LocalMIM's are [4,2,1,0.5]; empty: all 1."""
    targets: tuple[Literal["pixels", "features", "hog", "teacher"], ...] = ()
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
    teacher: int = 0
    """Where the target is teacher: the block of the teacher, counted from 1, whose output is predicted."""

    @property
    def key(self) -> tuple[str, float]:
        """What it must find among a batch's targets: kind, of a teacher with the block, and scale."""
        return f"{self.target}{self.teacher}" if self.target == "teacher" else self.target, self.scale

    @property
    def name(self) -> str:
        """`block12_pixels`, with the scale where it is not 1; `block4_teacher12`."""
        scale = {4.0: "_x4", 2.0: "_x2", 0.5: "_half"}.get(self.scale, "")
        return f"block{self.block}_{self.key[0]}{scale}"

    def weight_at(self, progress: float) -> float:
        """The weight of its loss when `progress` (0..1) of the run is done."""
        return self.weight + (self.weight_end - self.weight) * progress


SCALES = (4.0, 2.0, 1.0, 0.5)


def head_specs(
    heads: HeadsConfig, target: TargetConfig, depth: int, teacher: TeacherConfig = TeacherConfig()
) -> tuple[HeadSpec, ...]:
    """The heads that the settings ask for, over an encoder of `depth` blocks. Raises ValueError for bad weights."""
    if not heads.blocks:
        return paired((HeadSpec(depth, target.kind),), teacher, depth)
    count = len(heads.blocks)
    kinds = heads.targets or (target.kind,) * count
    start, end = loss_weights(heads.weights, count)
    rows = zip(heads.blocks, kinds, heads.scales or (1.0,) * count, start, end, strict=True)
    return paired(tuple(HeadSpec(*row, matching=row[1] not in IMAGE_TARGETS) for row in rows), teacher, depth)


def paired(specs: tuple[HeadSpec, ...], teacher: TeacherConfig, depth: int) -> tuple[HeadSpec, ...]:
    """The heads, those that a teacher gives their target each with its block of the teacher."""
    taught = [spec.block for spec in specs if spec.target == "teacher"]
    block_of = dict(zip(taught, teacher.blocks(taught, depth), strict=True))
    return tuple(replace(spec, teacher=block_of[spec.block]) if spec.target == "teacher" else spec for spec in specs)


IMAGE_TARGETS = ("pixels", "hog")
"""Targets that are made of the image alone."""
PATCHES = ("pixels", 1.0)
"""The target that is the very patches which a cache stores."""


def learning_heads(specs: Iterable[HeadSpec], cut: int, entry: int | None = None) -> tuple[HeadSpec, ...]:
    """The heads that can learn at a cut: those behind it.

    entry: the block at which a step's inputs enter, the cut itself unless blocks before it freeze in place. At 0 inputs
    are images and there are no features yet: heads that ask for them predict pixels.
    """
    features = cut if entry is None else entry
    behind = tuple(spec for spec in specs if spec.block > cut)
    return behind if features else without(behind, "features")


def without(specs: Iterable[HeadSpec], target: str) -> tuple[HeadSpec, ...]:
    """The heads with pixels in place of a target that is not there."""
    return tuple(replace(spec, target="pixels", teacher=0) if spec.target == target else spec for spec in specs)


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
    carry: bool = True
    """Whether stages after the first go on with the decoders of the stage before. false: each begins with new ones, of
    all heads, and the optimiser remembers nothing of them; arms that freeze do so where their stages begin."""

    def inputs(self, later: bool = False) -> dict[str, Any]:
        """What training depends on, by the setting's name. later: after stage 0, which has no decoder to carry over."""
        named = {f"decoder.{name}": value for name, value in asdict(self).items() if name != "carry"}
        return named | ({"decoder.carry": False} if later and not self.carry else {})

    def sizes(self, encoder_width: int) -> tuple[int, int]:
        """(width, heads) beside an encoder of a width."""
        width = self.width or 32 * max(1, round(encoder_width / 96))
        return width, self.heads or max(1, width // 32)


PLAIN_TOKENS = 256
"""Tokens up to which attention is written out on a CPU. Measured on two cores, widths 64-768, forward and backward: at
16-196 tokens 1.6-5.9 times as fast as the fused kernel in bfloat16, 0.95-1.6 in float32; at 784 0.7-1.0 and 0.5-0.8."""

SIZES = {"vit_tiny": (192, 12, 3), "vit_small": (384, 12, 6), "vit_base": (768, 12, 12)}
"""Width, depth and heads of the models that have a short name."""


def model_name(name: str) -> str:
    """timm's name of a model."""
    return f"{name}_patch16_224" if name in SIZES else name
