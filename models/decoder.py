"""Decoders: from the encoder's visible tokens to a prediction for every token, or for some of the hidden ones.

`Decoder` is the narrow transformer that all share. What it predicts is read from it in one of two ways:
`MatchingReadout` has the shape of the encoder's input at the cut, `(B, L, D)`, from which one more linear layer reads
image targets; `LocalReadout` is LocalMIM's, which predicts a finer or coarser grid than that of the tokens.

Shapes: B batch, K visible tokens, L all tokens, S the tokens that a decoder works on (all, or the visible and some of
the hidden ones), M those of them that it predicts, C other hidden ones, D the encoder's width, W the decoder's, T
values of a target.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from models.config import DecoderConfig
from models.masking import Mask, restore_tokens
from models.vit import sincos_2d


class MatchingReadout(nn.Module):
    """Features of the encoder's width, and image targets read from them."""

    def __init__(self, width: int, encoder_width: int, image_values: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, encoder_width)
        self.pixel_head = nn.Linear(encoder_width, image_values)

    def forward(self, tokens_BSW: Tensor, of_image: bool) -> Tensor:
        features_BSD = self.head(tokens_BSW)
        return self.pixel_head(features_BSD) if of_image else features_BSD


class LocalReadout(nn.Module):
    """LocalMIM's prediction at a scale of the token grid: 4, 2, 1 or 0.5.

    A transposed convolution whose kernel is its stride makes the places of one token from that token alone, so it is a
    linear layer on each: the finer places of a token stay with it, (B, S, scale² * T), and a decoder that skips tokens
    skips theirs. Scale 0.5 averages 2x2 tokens of the whole grid: (B, L / 4, T).
    Source: `MAE_Decoder.pred` in Haoqing-Wang/LocalMIM, ViT/models_mim.py.
    """

    def __init__(self, width: int, scale: float, values: int) -> None:
        super().__init__()
        self.scale, hidden = scale, width
        self.up = nn.ModuleList()
        for step in range({4.0: 2, 2.0: 1}.get(scale, 0)):
            if step:
                self.up.append(nn.Sequential(nn.LayerNorm(hidden, eps=1e-6), nn.GELU()))
            self.up.append(nn.Linear(hidden, 4 * (hidden // 2)))
            hidden //= 2
        self.head = nn.Linear(hidden, values)

    def forward(self, tokens_BSW: Tensor, of_image: bool) -> Tensor:
        batch, tokens, width = tokens_BSW.shape
        if self.scale < 1:
            side = round(tokens**0.5)
            grid = tokens_BSW.reshape(batch, side // 2, 2, side // 2, 2, width)
            return self.head(grid.mean(dim=(2, 4)).flatten(1, 2))
        places = tokens_BSW.unsqueeze(2)  # (B, S, places of a token, W)
        for layer in self.up:
            places = layer(places)
            if isinstance(layer, nn.Linear):
                places = places.unflatten(-1, (4, -1)).flatten(2, 3)
        return self.head(places).flatten(2)


class Decoder(nn.Module):
    """Narrow transformer over all tokens, or over the visible and some hidden ones; positions are fixed sin-cos."""

    positions: Tensor

    def __init__(self, grid: int, in_width: int, config: DecoderConfig) -> None:
        super().__init__()
        width, heads = config.sizes(in_width)
        self.embed = nn.Linear(in_width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.register_buffer("positions", sincos_2d(width, grid), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        latent_BKD: Tensor,
        mask: Mask,
        ids_decode_BM: Tensor | None = None,
        ids_beside_BC: Tensor | None = None,
    ) -> Tensor:
        """(B, L, W) in raster order; with `ids_decode` only the hidden tokens at those places, (B, M, W), which attend
        to one another, to the visible ones, and to the hidden ones at `ids_beside`."""
        visible = self.embed(latent_BKD)
        if ids_decode_BM is None:
            tokens = restore_tokens(visible, self.mask_token, mask.ids_restore)
            return self.norm(self.blocks(tokens + self.positions))
        hidden = ids_decode_BM if ids_beside_BC is None else torch.cat([ids_beside_BC, ids_decode_BM], dim=1)
        filler = self.mask_token.to(visible.dtype).expand(*hidden.shape, -1)
        places = torch.cat([mask.ids_keep, hidden], dim=1)
        tokens = torch.cat([visible, filler], dim=1) + self.positions[places]
        if not len(self.blocks):
            return self.norm(tokens[:, -ids_decode_BM.shape[1] :])
        *before, last = self.blocks
        for block in before:
            tokens = block(tokens)
        return self.norm(run_for_last(last, tokens, ids_decode_BM.shape[1]))


def run_for_last(block: nn.Module, tokens_BSW: Tensor, count: int) -> Tensor:
    """(B, count, W): what a block gives for its last `count` tokens, which attend to all; exactly that, and the others,
    whose output nobody reads, cost keys and values only."""
    assert isinstance(block, Block)
    attention = block.attn
    assert isinstance(attention, Attention) and attention.qkv.bias is not None
    width, seen = tokens_BSW.shape[-1], block.norm1(tokens_BSW)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    query = linear(seen[:, -count:], weight[:width], bias[:width]).unflatten(-1, (attention.num_heads, -1))
    key, value = linear(seen, weight[width:], bias[width:]).unflatten(-1, (2, attention.num_heads, -1)).unbind(2)
    heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if attention.fused_attn:
        mixed = scaled_dot_product_attention(*heads)
    else:
        mixed = ((heads[0] * attention.scale) @ heads[1].transpose(-2, -1)).softmax(-1) @ heads[2]
    last_BMW = tokens_BSW[:, -count:] + attention.proj(mixed.transpose(1, 2).flatten(2))
    return last_BMW + block.mlp(block.norm2(last_BMW))


def initialise(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
