"""The encoder: its parts together are timm's model, its groups are separate, its identity is its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from timm.models.vision_transformer import Attention

from models.config import ModelConfig
from models.identity import model_identity
from models.vit import ModelError, build_encoder, frozen_hash, sincos_2d

Small = Callable[..., ModelConfig]
# Plain; with a norm before the blocks; with layer scale.
MODELS = ("vit_tiny", "vit_base_patch16_clip_224", "deit3_small_patch16_224")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_split_at_every_cut_it_is_timm_s_forward(small: Small, name: str, attention: str) -> None:
    encoder = build_encoder(small(name=name, attention=attention), seed=0).eval()
    encoder.set_attention("cpu")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        whole = encoder.vit.forward_features(images)
        for cut in range(encoder.depth + 1):
            tokens = encoder.run(encoder.embed(images), 0, cut)
            assert tokens.shape == (2, 16, 24)
            assert torch.equal(encoder.norm(encoder.run(tokens, cut, encoder.depth)), whole)


def test_every_block_counts(small: Small) -> None:
    encoder = build_encoder(small(), seed=0).eval()
    tokens = torch.randn(1, 16, 24)
    steps = [encoder.run(tokens, 0, stop) for stop in range(5)]
    assert torch.equal(steps[0], tokens)
    assert all((after - before).abs().max() > 1e-3 for before, after in pairwise(steps))


def test_embed_adds_the_sincos_positions_and_no_class_token(small: Small) -> None:
    encoder = build_encoder(small(), seed=0)
    images = torch.randn(1, 3, 16, 16)
    want = encoder.vit.patch_embed(images) + sincos_2d(24, 4)
    assert torch.equal(encoder.embed(images), want) and want.shape == (1, encoder.num_tokens, encoder.width)
    assert not [name for name in encoder.state_dict() if "cls_token" in name or name.startswith("vit.head")]


def test_sincos_is_mae_s_definition() -> None:
    width, grid = 12, 3
    found = sincos_2d(width, grid)
    assert found.shape == (9, 12) and found.dtype == torch.float32
    for token in range(grid * grid):
        row, column = divmod(token, grid)
        want = []
        for place in (column, row):
            angles = [place / 10000 ** (index / 3) for index in range(3)]
            want += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
        torch.testing.assert_close(found[token], torch.tensor(want), rtol=0, atol=1e-6)


def test_sincos_refuses_a_width_that_4_does_not_divide() -> None:
    with pytest.raises(ModelError, match=r"^model.width=6 is not divisible by 4"):
        sincos_2d(6, 2)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_run_as_if_each_were_alone(small: Small, groups: int) -> None:
    encoder = build_encoder(small(), seed=0).eval()
    tokens, size = torch.randn(3, 16, 24), 16 // groups
    with torch.no_grad():
        found, _ = encoder.run_groups(tokens, encoder.prefix(3), groups, 1, 4)
        for group in range(groups):
            own = slice(group * size, (group + 1) * size)
            torch.testing.assert_close(found[:, own], encoder.run(tokens[:, own], 1, 4), rtol=0, atol=1e-6)


def test_nothing_passes_from_a_group_to_another(small: Small) -> None:
    encoder = build_encoder(small(), seed=0).eval()
    tokens = torch.randn(2, 16, 24)
    changed = tokens.clone()
    changed[1, 5] = torch.randn(24)
    after, before = (encoder.run_groups(one, encoder.prefix(2), 4, 0, 4)[0] for one in (changed, tokens))
    moved = (after - before).abs().amax(dim=2)
    assert (moved[1, 4:8] > 0).all()
    moved[1, 4:8] = 0
    assert moved.max() == 0


@pytest.mark.parametrize("cut", range(5))
def test_freeze_stops_all_before_the_cut(small: Small, cut: int) -> None:
    encoder = build_encoder(small(name="vit_base_patch16_clip_224"), seed=0)
    encoder.freeze(4)
    encoder.freeze(cut)
    encoder.train()
    before = ("pos_embed", *(("patch_embed.", "norm_pre.") if cut else ()), *(f"blocks.{i}." for i in range(cut)))
    for name, parameter in encoder.vit.named_parameters():
        assert parameter.requires_grad != name.startswith(before), name
    assert [block.training for block in encoder.vit.blocks] == [False] * cut + [True] * (4 - cut)
    assert encoder.vit.patch_embed.training == encoder.vit.norm_pre.training == (cut == 0)
    assert encoder.vit.norm.training
    encoder.eval()
    assert not any(module.training for module in encoder.modules())


@pytest.mark.parametrize(
    ("kind", "device", "tokens", "fused"),
    [
        ("auto", "cpu", 0, False),
        ("auto", "cpu", 256, False),
        ("auto", "cpu", 257, True),
        ("auto", "cuda", 0, True),
        ("plain", "cuda", 0, False),
        ("plain", "cpu", 784, False),
        ("fused", "cpu", 0, True),
    ],
)
def test_attention_is_chosen_for_device_and_tokens(
    small: Small, kind: str, device: str, tokens: int, fused: bool
) -> None:
    encoder = build_encoder(small(attention=kind), seed=0)
    encoder.set_attention(device, tokens)
    chosen = [module.fused_attn for module in encoder.modules() if isinstance(module, Attention)]
    assert chosen == [fused] * 4


def test_both_kinds_of_attention_agree(small: Small) -> None:
    tokens = torch.randn(2, 16, 24)
    encoders = [build_encoder(small(attention=kind), seed=0).eval() for kind in ("plain", "fused")]
    for encoder in encoders:
        encoder.set_attention("cpu")
    plain, fused = (encoder.run(tokens, 0, 4) for encoder in encoders)
    torch.testing.assert_close(plain, fused, rtol=0, atol=1e-5)


def test_weights_are_a_pure_function_of_the_seed(small: Small) -> None:
    before = torch.get_rng_state()
    first, again, other = (build_encoder(small(), seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    third = build_encoder(small(), 3).state_dict()
    assert all(torch.equal(first[name], again[name]) and torch.equal(first[name], third[name]) for name in first)
    assert not torch.equal(first["vit.blocks.0.attn.qkv.weight"], other["vit.blocks.0.attn.qkv.weight"])


def test_the_named_sizes_are_timm_s() -> None:
    for name in ("vit_tiny", "vit_small", "vit_base"):
        config = ModelConfig(name=name, depth=1)
        encoder = build_encoder(config, seed=0)
        full = model_identity(ModelConfig(name=f"{name}_patch16_224"))
        assert full == model_identity(ModelConfig(name=name))
        assert full["width"] == encoder.width and encoder.num_tokens == 196
        assert model_identity(config) == full | {"depth": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_tinny"}, r"model.name=vit_tinny cannot be used: timm knows no model of that name; .*vit_tiny"),
        ({"patch_size": 5}, r"model.patch_size=5 does not divide model.image_size=16"),
        ({"heads": 5}, r"divisible by"),
        ({"width": 30}, r"model.width=30 is not divisible by 4"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name_in_one_line(
    small: Small, changes: dict[str, str], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        build_encoder(small(**changes), seed=0)
    assert isinstance(caught.value, ValueError) and "\n" not in str(caught.value)


FROZEN = ("patch_embed.proj.weight", "pos_embed", "norm_pre.weight", "blocks.0.norm1.bias", "blocks.1.mlp.fc2.weight")
LEARNING = ("blocks.2.norm1.weight", "blocks.10.norm1.bias", "norm.weight")


@pytest.mark.parametrize("name", FROZEN + LEARNING)
def test_the_frozen_hash_changes_with_a_frozen_weight_only(small: Small, name: str) -> None:
    state = build_encoder(small(name="vit_base_patch16_clip_224", depth=11), seed=0).vit.state_dict()
    before = frozen_hash(state, 2)
    assert len(before) == 64
    changed = dict(state)
    changed[name] = torch.nextafter(state[name], torch.tensor(torch.inf))
    assert (frozen_hash(changed, 2) != before) == (name in FROZEN)


def test_the_frozen_hash_depends_on_cut_type_shape_and_name_but_not_on_order(small: Small) -> None:
    state = build_encoder(small(), seed=0).vit.state_dict()
    hashes = {frozen_hash(state, cut) for cut in range(5)}
    bias = state["blocks.0.norm1.bias"]
    hashes.add(frozen_hash(state | {"blocks.0.norm1.bias": bias.double()}, 1))
    hashes.add(frozen_hash(state | {"blocks.0.norm1.bias": bias.reshape(2, 12)}, 1))
    hashes.add(frozen_hash({name.replace("norm1", "norm3"): value for name, value in state.items()}, 1))
    assert len(hashes) == 8
    backwards = {name: state[name].clone() for name in reversed(list(state))}
    assert frozen_hash(backwards, 3) == frozen_hash(state, 3)
