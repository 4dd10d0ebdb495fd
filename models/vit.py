"""The encoder: a vision transformer made of timm's parts, which can be run from any block to any other. The only place
that knows about class tokens (there is none, so nothing at the input keeps learning behind frozen blocks) and positions
(fixed sin-cos).

Shapes: B batch, C channels, H and W pixels, L tokens, D width.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from models.config import ModelConfig, model_name
from models.spec import derive_seed


class ModelError(ValueError):
    """A model that cannot be built as asked."""


class Encoder(nn.Module):
    """timm's VisionTransformer, split: `embed`, then `run` over the blocks, then `norm`."""

    def __init__(self, vit: VisionTransformer, attention: str) -> None:
        super().__init__()
        self.vit = vit
        self.attention = attention
        self.depth, self.width, self.num_tokens = len(vit.blocks), vit.embed_dim, vit.patch_embed.num_patches
        self.cut = 0
        self.skipped: frozenset[int] = frozenset()
        """Learning blocks that do not run: set for a training step by `models.drop`, empty at all other times."""
        self.freeze(0)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """(B, L, D): normalised images as tokens with their positions."""
        return self.vit.norm_pre(self.vit.patch_embed(images_BCHW) + self.vit.pos_embed)

    def run(self, tokens_BLD: Tensor, start: int, stop: int) -> Tensor:
        """The blocks start..stop-1."""
        for index, block in enumerate(self.vit.blocks[start:stop], start):
            if index not in self.skipped:
                tokens_BLD = block(tokens_BLD)
        return tokens_BLD

    def run_groups(self, tokens_BLD: Tensor, groups: int, start: int, stop: int) -> Tensor:
        """The blocks start..stop-1 over each of `groups` token groups on its own; tokens lie group after group."""
        batch, tokens, width = tokens_BLD.shape
        grouped = tokens_BLD.reshape(batch * groups, tokens // groups, width)
        return self.run(grouped, start, stop).reshape(batch, tokens, width)

    def norm(self, tokens_BLD: Tensor) -> Tensor:
        """The norm behind the last block."""
        return self.vit.norm(tokens_BLD)

    def freeze(self, cut: int) -> None:
        """Let only the blocks from `cut` on, and the last norm, learn; with cut 0 the patch embedding too."""
        self.cut = cut
        self.requires_grad_(True)
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.vit.get_parameter("pos_embed").requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Encoder:
        """Frozen parts stay in eval mode: no dropout, no drop path, whatever the rest does."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        return self

    def set_attention(self, device: torch.device | str) -> None:
        """Choose every block's attention kernel for a device."""
        use_attention(self.vit.blocks, self.attention, device)

    def _frozen_parts(self) -> list[nn.Module]:
        return [self.vit.patch_embed, self.vit.norm_pre, *self.vit.blocks[: self.cut]] if self.cut else []


def use_attention(blocks: nn.Module, kind: str, device: torch.device | str) -> None:
    """Switch timm's own attention between softmax(QK')V written out and torch's fused kernel.

    `auto` writes it out on a CPU, where the fused kernel's backward is slow at 16-64 tokens, and fuses elsewhere.
    """
    fused = kind == "fused" or (kind == "auto" and torch.device(device).type != "cpu")
    for module in blocks.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused  # type: ignore[misc] # Final only for TorchScript


def build_encoder(config: ModelConfig, seed: int) -> Encoder:
    """The encoder that the settings ask for, its weights a pure function of the seed. Raises ModelError."""
    if config.weights:
        raise ModelError(f"model.weights={config.weights} is not built yet in this version; leave it empty")
    if config.image_size % config.patch_size:
        raise ModelError(f"model.patch_size={config.patch_size} does not divide model.image_size={config.image_size}")
    asked = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "encoder"))
        vit = _create(config, {name: value for name, value in asked.items() if value})
    encoder = Encoder(vit, config.attention)
    grid = config.image_size // config.patch_size
    with torch.no_grad():
        vit.get_parameter("pos_embed").copy_(sincos_2d(encoder.width, grid))
    return encoder


def _create(config: ModelConfig, sizes: dict[str, Any]) -> VisionTransformer:
    name = model_name(config.name)
    if not timm.is_model(name):
        raise ModelError(f"model.name={config.name} is no model that timm knows; try vit_tiny, vit_small or vit_base")
    try:
        vit = timm.create_model(
            name,
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=0,
            global_pool="",
            class_token=False,
            **sizes,
        )
    except (TypeError, AssertionError, ValueError) as error:
        reason = str(error) or f"timm refuses image_size={config.image_size} with patch_size={config.patch_size}"
        raise ModelError(
            f"model.name={config.name} cannot be built as a plain ViT without class token: {reason}"
        ) from error
    if odd := _odd_part(vit):
        raise ModelError(
            f"model.name={config.name} is built on {odd}, not on timm's plain VisionTransformer, PatchEmbed and Block, "
            "so it cannot be cut between blocks; try vit_tiny, vit_small or vit_base"
        )
    assert isinstance(vit, VisionTransformer)
    if vit.num_prefix_tokens or vit.pos_embed is None:
        raise ModelError(
            f"model.name={config.name} has register tokens or no absolute positions, which is not built yet"
        )
    return vit


def _odd_part(vit: nn.Module) -> str:
    """Class name of the first part that is not timm's plain one; empty where there is none."""
    if type(vit) is not VisionTransformer:
        return type(vit).__name__
    if type(vit.patch_embed) is not PatchEmbed:  # a hybrid: its convolutions make the tokens
        return type(vit.patch_embed).__name__
    return next((type(block).__name__ for block in vit.blocks if not isinstance(block, Block)), "")


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


def frozen_hash(state: Mapping[str, Tensor], cut: int) -> str:
    """sha256 over names, types, shapes and bytes of all before block `cut`: patch embedding, positions, blocks."""
    before = ("patch_embed.", "pos_embed", "norm_pre.", *(f"blocks.{block}." for block in range(cut)))
    sha = hashlib.sha256()
    for name in sorted(name for name in state if name.startswith(before)):
        value = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
