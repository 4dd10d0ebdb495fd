"""Checkpoints of other projects: what timm itself would load, by the names and wrappers that MAE and DINO use."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from models.config import ModelConfig
from models.families import ModelError
from models.vit import Encoder, build_encoder
from models.weights import encoder_state

SMALL = ModelConfig(image_size=32, patch_size=8, width=24, depth=2, heads=2, class_token=True)
State = dict[str, Tensor]


def theirs(name: str = "vit_tiny_patch16_224", **changes: Any) -> State:
    """The state of a model of timm's, every tensor with values of its own."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2} | changes
    torch.manual_seed(5)
    state = timm.create_model(name, **sizes).state_dict()
    return {key: torch.randn_like(value) for key, value in state.items()}


def ours(**changes: Any) -> Encoder:
    return build_encoder(dataclasses.replace(SMALL, **changes), seed=0).eval()


def loaded(content: dict[str, Any], encoder: Encoder) -> list[str]:
    state, notes = encoder_state(content, encoder.vit, "file.pth")
    encoder.vit.load_state_dict(state)
    return notes


def check_features(encoder: Encoder, model: torch.nn.Module, size: int = 32) -> None:
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        tokens = encoder.norm(encoder.run(encoder.tokens(images), 0, encoder.depth))
        torch.testing.assert_close(tokens, model.eval().forward_features(images), rtol=1e-5, atol=1e-5)


def decoder_keys() -> State:
    names = ("decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "decoder_pred.bias")
    return {name: torch.randn(3) for name in names}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "optimizer": {"state": {}}, "epoch": 3},
        lambda s: {"state_dict": {f"module.{name}": value for name, value in s.items()}},
        lambda s: {f"encoder.{name}": value for name, value in s.items()},
        lambda s: {"model": {f"module.backbone.{name}": value for name, value in s.items()}},
        lambda s: {"teacher": {f"backbone.{n}": v for n, v in s.items()} | {"head.mlp.0.bias": torch.ones(2)}},
        lambda s: {f"visual.trunk.{name}": value for name, value in s.items()},
        lambda s: {"encoder": {}, "target_encoder": {f"module.{n}": v for n, v in s.items()}, "predictor": {}},
        lambda s: {"model": {n: v.half() for n, v in s.items()} | decoder_keys() | {"mask_token": torch.ones(1)}},
    ],
    ids=["timm", "model", "state_dict", "encoder", "module.backbone", "dino", "openclip", "i-jepa", "mae half"],
)
def test_every_wrapper_and_prefix_gives_the_same_encoder(wrap: Any) -> None:
    state = theirs(num_classes=7)
    encoder = ours()
    loaded(wrap(state), encoder)
    for name, value in encoder.vit.state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, state[name], rtol=1e-3, atol=1e-3)


def test_the_teacher_is_taken_before_its_student_and_an_average_before_both() -> None:
    states = {name: {f"module.backbone.{k}": v for k, v in theirs().items()} for name in ("student", "teacher")}
    states["teacher"]["module.backbone.norm.bias"] = torch.full((24,), 4.0)
    encoder = ours()
    notes = loaded(states, encoder)
    assert encoder.vit.norm.bias[0] == 4.0 and notes[0] == "taken from teacher"
    flat = {f"{name}.backbone.{key}": value for name in states for key, value in theirs().items()}
    flat["teacher.backbone.norm.bias"] = torch.full((24,), 5.0)
    with pytest.raises(ModelError, match=r"has student.backbone.\S+ beside the encoder"):
        loaded(flat, encoder)
    average = theirs() | {"norm.bias": torch.full((24,), 6.0)}
    assert loaded({"model": theirs(), "model_ema": average}, encoder)[0] == "taken from model_ema"
    assert encoder.vit.norm.bias[0] == 6.0


def test_what_is_left_out_is_said_by_kind() -> None:
    extra = decoder_keys() | {"mask_token": torch.ones(1), "head_dist.weight": torch.ones(2, 2)}
    notes = loaded({"model": theirs(num_classes=7) | extra}, ours())
    assert notes == [
        "taken from model",
        "heads left out (head.bias and 2 more)",
        "a decoder left out (decoder_blocks.0.norm1.weight and 3 more)",
        "mask tokens left out (mask_token)",
    ]


@pytest.mark.parametrize(
    ("name", "config", "old"),
    [
        ("vit_tiny_patch16_224", {}, {"img_size": 48}),
        ("vit_tiny_patch16_224", {}, {"patch_size": 16, "img_size": 64}),
        ("vit_tiny_patch16_224", {"image_size": 48}, {"img_size": 64, "patch_size": 16}),
        ("deit3_small_patch16_224", {"name": "deit3_small_patch16_224"}, {"img_size": 64}),
        ("vit_base_patch16_clip_224", {"name": "vit_base_patch16_clip_224"}, {"img_size": 16}),
        ("vit_base_patch16_siglip_gap_224", {"name": "vit_base_patch16_siglip_gap_224", "class_token": False},
         {"img_size": 48}),
        ("vit_so150m_patch16_reg4_gap_256", {"name": "vit_so150m_patch16_reg4_gap_256", "class_token": False},
         {"img_size": 48}),
    ],
)  # fmt: skip
def test_another_grid_or_patch_is_resampled_as_timm_does(
    name: str, config: dict[str, Any], old: dict[str, Any]
) -> None:
    state = theirs(name, **old, num_classes=0)
    encoder = ours(**config)
    notes = loaded(state, encoder)
    size = encoder.vit.patch_embed.img_size[0]
    sizes = {"img_size": size, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model(name, **sizes)
    from timm.models.vision_transformer import checkpoint_filter_fn

    model.load_state_dict(checkpoint_filter_fn(dict(state), model))
    assert any("resampled" in note for note in notes)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(encoder.vit.state_dict()[key], value, rtol=0, atol=1e-6)
    check_features(encoder, model, size)


def test_dinov2_with_registers_becomes_what_timm_makes_of_it() -> None:
    name = "vit_small_patch14_reg4_dinov2"
    state = theirs(name, num_classes=0)
    raw = {key: value for key, value in state.items() if key not in ("reg_token", "pos_embed")}
    raw |= {"register_tokens": state["reg_token"], "pos_embed": torch.randn(1, 17, 24), "mask_token": torch.ones(1, 24)}
    encoder = ours(name=name)
    loaded(dict(raw), encoder)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    model = timm.create_model(name, **sizes)
    from timm.models.vision_transformer import checkpoint_filter_fn

    model.load_state_dict(checkpoint_filter_fn(dict(raw), model))
    check_features(encoder, model)
    # The same file into a model whose prefix has positions of its own computes the same tokens.
    other = ours(registers=4, name="vit_tiny")
    content = {key: value for key, value in raw.items() if not key.endswith("gamma")}
    loaded(content, other)
    torch.testing.assert_close(other.prefix(2), encoder.prefix(2))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other.embed(images), encoder.embed(images))


def test_old_names_become_those_of_today() -> None:
    name = "deit3_small_patch16_224"
    state = theirs(name, num_classes=0)
    old = {key.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): v for key, v in state.items()}
    old["patch_embed.proj.weight"] = old["patch_embed.proj.weight"].flatten(1)
    assert "blocks.1.gamma_2" in old
    encoder = ours(name=name)
    loaded(old, encoder)
    assert all(torch.equal(value, state[key]) for key, value in encoder.vit.state_dict().items())


def test_a_norm_behind_the_pooling_starts_ours_and_a_second_one_is_a_head() -> None:
    pooled = theirs(num_classes=7, global_pool="avg")
    assert "norm.weight" not in pooled
    encoder = ours()
    notes = loaded(pooled, encoder)
    assert torch.equal(encoder.vit.norm.weight, pooled["fc_norm.weight"])
    assert "the norm behind the pooling is taken for the last norm" in notes
    loaded(theirs() | {"fc_norm.weight": torch.zeros(24)}, encoder)
    assert torch.equal(encoder.vit.norm.weight, theirs()["norm.weight"])


def without(state: State, key: str) -> State:
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (theirs(), {"class_token": False}, r"has a class token, model.class_token=false; set model.class_token=true$"),
        (theirs(class_token=False, global_pool="avg"), {}, r"has no class token, .* set model.class_token=false$"),
        (theirs(reg_tokens=3), {}, r"has 3 register tokens, the model has 0; set model.registers=3$"),
        (theirs(), {"registers": 2}, r"has 0 register tokens, the model has 2"),
        (theirs(), {"width": 48},
         r"cls_token is \(1, 1, 24\) in the file and \(1, 1, 48\) in the model; .* width 24 and depth 2"),
        (theirs(depth=3), {}, r"blocks.2.norm1.weight \(24,\) of the file has no place .* depth 3"),
        (theirs(), {"depth": 3}, r"blocks.2.norm1.weight \(24,\) of the model is not in the file"),
        (without(theirs(), "blocks.1.attn.qkv.bias"), {}, r"blocks.1.attn.qkv.bias \(72,\) of the model is not in"),
        (theirs() | {"blocks.0.attn.gate.weight": torch.ones(2, 3)}, {},
         r"blocks.0.attn.gate.weight \(2, 3\) of the file has no place in the model"),
        (theirs(in_chans=1), {},
         r"patch_embed.proj.weight is \(24, 1, 8, 8\) in the file and \(24, 3, 8, 8\) in the model"),
        (theirs() | {"pos_embed": torch.ones(1, 13, 24)}, {}, r"pos_embed \(1, 13, 24\): its 13 positions are no sq"),
        ({"vit.embeddings.cls_token": torch.ones(1)}, {}, r"has no patch_embed.proj.weight, .*vit.embeddings.cls_tok"),
        ({}, {}, r"no ViT in timm's names; it begins with nothing"),
        ({f"encoder.{k}": v for k, v in theirs().items()} | {"flow.weight": torch.ones(1)}, {},
         r"has flow.weight beside the encoder, of no known kind"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_in_one_line(content: State, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=rf"^model.weights=file.pth.*{message}") as caught:
        loaded(content, ours(**changes))
    assert "\n" not in str(caught.value)
