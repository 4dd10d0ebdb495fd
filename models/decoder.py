"""The matching-shape decoder: from the encoder's visible tokens to a tensor of the shape of the encoder's input at the
cut, `(B, L, D)`, hidden tokens filled in. Where pixels are the target, one more linear layer reads them from it.

Shapes: B batch, K visible tokens, L all tokens, D the encoder's width, P values of a patch.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from models.config import DecoderConfig
from models.masking import restore_tokens
from models.spec import derive_seed
from models.vit import Encoder, sincos_2d, use_attention


class Decoder(nn.Module):
    """Narrow transformer over all tokens; positions are fixed sin-cos."""

    positions: Tensor

    def __init__(
        self, grid: int, in_width: int, config: DecoderConfig, pixel_values: int, attention: str = "auto"
    ) -> None:
        super().__init__()
        self.attention = attention
        width, heads = config.sizes(in_width)
        self.embed = nn.Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sincos_2d(width, grid), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, in_width)
        self.pixel_head = nn.Linear(in_width, pixel_values)
        self.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent_BKD: Tensor, ids_restore_BL: Tensor) -> Tensor:
        """(B, L, D) in raster order."""
        tokens = restore_tokens(self.embed(latent_BKD), self.mask_token, ids_restore_BL)
        return self.head(self.norm(self.blocks(tokens + self.positions)))

    def set_attention(self, device: torch.device | str) -> None:
        """Choose every block's attention kernel for a device."""
        use_attention(self.blocks, self.attention, device)


def build_decoder(config: DecoderConfig, encoder: Encoder, pixel_values: int, seed: int) -> Decoder:
    """The decoder that matches an encoder, its weights a pure function of the seed."""
    grid = round(encoder.num_tokens**0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "decoder"))
        return Decoder(grid, encoder.width, config, pixel_values, encoder.attention)


def _initialise(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
