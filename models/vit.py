"""The encoder: a vision transformer made of timm's parts, which can be run from any block to any other. The only place
that knows about class and register tokens (they freeze with the patch embedding, so nothing at the input keeps learning
behind frozen blocks) and positions (fixed: sin-cos, or those of a checkpoint file).

Shapes: B batch, C channels, H and W pixels, L tokens, R prefix tokens, S the prefix tokens of all groups, D width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping

import torch
from timm.layers import DiffAttention
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from models.config import IMAGENET_MEAN, IMAGENET_STD, PLAIN_TOKENS, RGB, ModelConfig
from models.families import ModelError, build_vit
from models.spec import derive_seed
from models.targets import normalize_images

__all__ = ["Encoder", "ModelError", "build_encoder", "frozen_hash", "sincos_2d", "use_attention"]


class Encoder(nn.Module):
    """timm's VisionTransformer, split: `normalized`, `embed` and `prefix`, then `run` over the blocks, then `norm`.

    The prefix are the class and register tokens, where the model has them. They stand in front of the patch tokens of
    every image, and of every token group, that runs through the blocks; frozen blocks and a cache keep them apart.
    """

    def __init__(
        self, vit: VisionTransformer, attention: str, mean: RGB = IMAGENET_MEAN, std: RGB = IMAGENET_STD
    ) -> None:
        super().__init__()
        self.vit = vit
        self.attention, self.mean, self.std = attention, mean, std
        self.depth, self.width, self.num_tokens = len(vit.blocks), vit.embed_dim, vit.patch_embed.num_patches
        self.num_prefix: int = vit.num_prefix_tokens
        self.cut = 0
        self.skipped: frozenset[int] = frozenset()
        """Learning blocks that do not run: set for a training step by `models.drop`, empty at all other times."""
        self.freeze(0)

    def normalized(self, images_BCHW: Tensor) -> Tensor:
        """uint8 RGB images as this encoder takes them: float32, of the mean and deviation that it was trained with."""
        return normalize_images(images_BCHW, self.mean, self.std)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """(B, L, D): normalised images as patch tokens with their positions."""
        positions_1LD = self.vit.get_parameter("pos_embed")[:, -self.num_tokens :]
        return self.vit.norm_pre(self.vit.patch_embed(images_BCHW) + positions_1LD)

    def prefix(self, batch: int) -> Tensor:
        """(B, R, D): class token, then registers, with their positions; R is 0 where the model has neither."""
        positions_1RD = self.vit.get_parameter("pos_embed")[:, : self.num_prefix]
        if not self.num_prefix:
            return positions_1RD.expand(batch, -1, -1)
        prefix_1RD = torch.cat(self._prefix_tokens, dim=1)
        if not self.vit.no_embed_class:
            prefix_1RD = prefix_1RD + positions_1RD
        return self.vit.norm_pre(prefix_1RD).expand(batch, -1, -1)

    def run(self, tokens_BLD: Tensor, start: int, stop: int) -> Tensor:
        """The blocks start..stop-1 over any tokens, a prefix in front of them or not."""
        for index, block in enumerate(self.vit.blocks[start:stop], start):
            if index not in self.skipped:
                tokens_BLD = block(tokens_BLD)
        return tokens_BLD

    def run_groups(
        self, tokens_BLD: Tensor, prefix_BSD: Tensor, groups: int, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """The blocks start..stop-1 over each of `groups` token groups on its own, behind its own copy of the prefix.

        Tokens lie group after group, and so do the prefixes: S = groups * R. Returns (tokens, prefixes).
        """
        batch, tokens, width = tokens_BLD.shape
        grouped = [part.reshape(batch * groups, -1, width) for part in (prefix_BSD, tokens_BLD) if part.shape[1]]
        found = self.run(torch.cat(grouped, dim=1), start, stop)
        prefix, patches = found.split([self.num_prefix, tokens // groups], dim=1)
        return patches.reshape(batch, tokens, width), prefix.reshape(batch, groups * self.num_prefix, width)

    def tokens(self, images_BCHW: Tensor) -> Tensor:
        """(B, R + L, D): what block 0 sees of whole images, the prefix in front."""
        patches_BLD = self.embed(images_BCHW)
        return self.with_prefix(patches_BLD, self.prefix(len(patches_BLD)))

    def with_prefix(self, tokens_BLD: Tensor, prefix_BRD: Tensor | None) -> Tensor:
        """Patch tokens behind their prefix; None where the model has none."""
        if not self.num_prefix:
            return tokens_BLD
        assert prefix_BRD is not None, "a model with prefix tokens needs them"
        return torch.cat([prefix_BRD, tokens_BLD], dim=1)

    def patches(self, tokens_BLD: Tensor) -> Tensor:
        """The patch tokens alone, of tokens behind their prefix."""
        return tokens_BLD[:, self.num_prefix :]

    def norm(self, tokens_BLD: Tensor) -> Tensor:
        """The norm behind the last block."""
        return self.vit.norm(tokens_BLD)

    def freeze(self, cut: int) -> None:
        """Let only the blocks from `cut` on, and the last norm, learn; with cut 0 what makes the tokens too."""
        self.cut = cut
        self.requires_grad_(True)
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.vit.get_parameter("pos_embed").requires_grad_(False)
        if cut:  # a class token that learned would draw the backward pass through all frozen blocks
            for token in self._prefix_tokens:
                token.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Encoder:
        """Frozen parts stay in eval mode: no dropout, no drop path, whatever the rest does."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def set_attention(self, device: torch.device | str, tokens: int = 0) -> None:
        """Choose every block's attention kernel for a device and the tokens of a sequence; 0 means a whole image's."""
        use_attention(self.vit.blocks, self.attention, device, tokens or self.num_tokens)

    @property
    def _prefix_tokens(self) -> list[Tensor]:
        return [token for token in (self.vit.cls_token, self.vit.reg_token) if token is not None]

    def _frozen_parts(self) -> list[nn.Module]:
        return [self.vit.patch_embed, self.vit.norm_pre, *self.vit.blocks[: self.cut]] if self.cut else []


def use_attention(blocks: nn.Module, kind: str, device: torch.device | str, tokens: int) -> None:
    """Switch timm's own attention between softmax(QK')V written out and torch's fused kernel.

    `auto` writes it out on a CPU for sequences of up to PLAIN_TOKENS tokens, and fuses elsewhere.
    """
    plain = torch.device(device).type == "cpu" and tokens <= PLAIN_TOKENS
    fused = kind == "fused" or (kind == "auto" and not plain)
    for module in blocks.modules():
        if isinstance(module, Attention | DiffAttention):
            module.fused_attn = fused  # type: ignore[misc] # Final only for TorchScript


def build_encoder(config: ModelConfig, seed: int) -> Encoder:
    """The encoder that the settings ask for, its weights a pure function of the seed. Raises ModelError.

    A checkpoint file that `model.weights` names is loaded where training starts, not here.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "encoder"))
        vit = build_vit(config)
    positions_1LD = vit.get_parameter("pos_embed")
    with torch.no_grad():  # the prefix stands nowhere: its positions are zero, as MAE's class token's
        positions_1LD.zero_()
        grid = config.image_size // config.patch_size
        positions_1LD[:, -vit.patch_embed.num_patches :] = sincos_2d(vit.embed_dim, grid)
    return Encoder(vit, config.attention, config.mean, config.std)


def sincos_2d(width: int, grid: int) -> Tensor:
    """(grid * grid, width) float32 sin-cos positions; the first half of the channels encodes the column.

    Source: `get_2d_sincos_pos_embed` in facebookresearch/mae, whose meshgrid puts w first. Raises ModelError unless 4
    divides width.
    """
    if width % 4:
        raise ModelError(f"model.width={width} is not divisible by 4, which 2-D sin-cos positions need")
    place = torch.arange(grid, dtype=torch.float64)
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    return torch.cat([_sincos_1d(width // 2, columns), _sincos_1d(width // 2, rows)], dim=1).float()


def _sincos_1d(width: int, place: Tensor) -> Tensor:
    frequency = torch.exp(-math.log(10000.0) * torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = place.reshape(-1, 1) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


ALL = -1
"""A cut behind everything, the last norm included."""


def frozen_names(names: Iterable[str], cut: int) -> list[str]:
    """Those of all before block `cut`, sorted: embedding, prefix, positions, blocks; with ALL, of everything."""
    if cut == ALL:
        return sorted(names)
    made = ("patch_embed.", "cls_token", "reg_token", "pos_embed", "norm_pre.")
    before = (*made, *(f"blocks.{block}." for block in range(cut)))
    return sorted(name for name in names if name.startswith(before))


def frozen_hash(state: Mapping[str, Tensor], cut: int) -> str:
    """sha256 over names, types, shapes and bytes of all before block `cut`."""
    sha = hashlib.sha256()
    for name in frozen_names(state, cut):
        value = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
