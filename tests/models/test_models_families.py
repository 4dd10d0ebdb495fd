"""Which of timm's models work, by name; every other is refused with its own reason in one line."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch

from models.config import ModelConfig
from models.families import REASONS, ModelError, build_vit, refusal
from models.vit import Encoder, build_encoder

SMALL = ModelConfig(image_size=32, patch_size=8, width=48, depth=2, heads=2)
WORK = {
    "vit_tiny_patch16_224": (1, 0),
    "vit_base_patch16_224.mae": (1, 0),
    "vit_small_patch16_224.dino": (1, 0),
    "vit_base_patch14_dinov2": (1, 0),
    "vit_small_patch14_reg4_dinov2": (1, 4),
    "vit_base_patch16_clip_224": (1, 0),
    "vit_base_patch16_clip_quickgelu_224": (1, 0),
    "vit_base_patch16_siglip_224": (0, 0),
    "vit_medium_patch16_reg4_gap_256": (0, 4),
    "vit_dlittle_patch16_reg1_gap_256": (0, 1),
    "vit_so150m_patch16_reg4_gap_256": (0, 4),
    "vit_base_patch16_radio_v3": (1, 7),
    "vit_intern300m_patch14_448": (1, 0),
    "flexivit_small": (1, 0),
    "beit3_base_patch16_224": (1, 0),
    "eva_large_patch14_196": (1, 0),
    "aimv2_large_patch14_224": (0, 0),
    "deit_tiny_patch16_224": (1, 0),
    "deit3_small_patch16_224": (1, 0),
    "test_vit3": (0, 1),
}
"""Model -> whether timm gives it a class token, and its registers."""

REFUSED = {
    "beit_base_patch16_224": "bias by relative position",
    "beitv2_large_patch16_224": "bias by relative position",
    "eva02_tiny_patch14_224": "rotary positions",
    "eva_giant_patch14_224": "timm's Eva",
    "vit_base_patch16_dinov3": "rotary positions",
    "vit_base_patch16_rope_224": "rotary positions",
    "vit_relpos_base_patch16_224": "bias by relative position",
    "samvit_base_patch16": "windows of the whole grid",
    "deit_tiny_distilled_patch16_224": "distillation token",
    "deit3_base_patch16_384_distilled": "no model of that name",
    "vit_base_r50_s16_224": "convolutional network",
    "vit_tiny_r_s16_p8_224": "convolutional network",
    "naflexvit_base_patch16_gap": "any size",
    "cait_s24_224": "class token enters behind",
    "convit_tiny": "by position on the whole grid",
    "xcit_nano_12_p16_224": "convolve over the whole grid",
    "volo_d1_224": "windows of the whole grid",
    "tnt_s_patch16_224": "second stream",
    "crossvit_9_240": "two streams",
    "mixer_b16_224": "weights for the whole grid",
    "swin_tiny_patch4_window7_224": "merged",
    "swinv2_tiny_window8_256": "merged",
    "hiera_tiny_224": "merged",
    "mvitv2_tiny": "merged",
    "pit_ti_224": "merged",
    "vit_base_patch16_rpn_224": "ResPostBlock, not on timm's plain Block",
    "vit_base_patch16_xp_224": "ParallelScalingBlock, not on timm's plain Block",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock, not on timm's plain Block",
    "resnet18": "no stack of plain transformer blocks",
    "vit_tinny": "no model of that name",
}


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("class_token", [False, True])
def test_a_plain_family_works_at_every_cut_and_is_timm_s_forward(name: str, class_token: bool) -> None:
    encoder = build_encoder(dataclasses.replace(SMALL, name=name, class_token=class_token), seed=0).eval()
    assert encoder.num_prefix == class_token + WORK[name][1]
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        whole = encoder.vit.forward_features(images)
        for cut in range(3):
            tokens = encoder.run(encoder.tokens(images), 0, cut)
            assert tokens.shape == (2, encoder.num_prefix + 16, 48)
            torch.testing.assert_close(encoder.norm(encoder.run(tokens, cut, 2)), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", WORK)
def test_timm_gives_the_model_these_prefix_tokens(name: str) -> None:
    with torch.device("meta"):
        vit = timm.create_model(name)
    assert (int(vit.has_class_token), vit.num_reg_tokens) == WORK[name]


@pytest.mark.parametrize("name", REFUSED)
def test_every_other_family_is_refused_by_name_with_its_reason_in_one_line(name: str) -> None:
    with pytest.raises(ModelError, match=rf"^model.name={name} cannot be used: .*{REFUSED[name]}") as caught:
        build_vit(dataclasses.replace(SMALL, name=name))
    assert "\n" not in str(caught.value) and str(caught.value).endswith("vit_tiny, vit_small or vit_base")


def test_a_tag_that_timm_does_not_know_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError) as caught:
        build_vit(dataclasses.replace(SMALL, name="vit_tiny_patch16_224.augrag"))
    assert str(caught.value) == (
        "model.name=vit_tiny_patch16_224.augrag cannot be built: Invalid pretrained tag (augrag) for "
        "vit_tiny_patch16_224."
    )
    assert build_vit(dataclasses.replace(SMALL, name="vit_tiny_patch16_224.augreg_in21k")).embed_dim == SMALL.width


def test_every_module_with_a_reason_is_one_of_timm_s() -> None:
    for module in REASONS:
        names = timm.list_models(module=module)
        assert names and all(refusal(name) == REASONS[module] for name in names), module


def test_no_model_outside_vit_and_deit_gets_through() -> None:
    plain = {*timm.list_models(module="vision_transformer"), *timm.list_models(module="deit")}
    passed = {name for name in timm.list_models() if not refusal(name)}
    assert passed == {name for name in plain if "distilled" not in name} and len(passed) > 100


def test_attention_of_every_kind_follows_the_setting() -> None:
    for name in ("vit_tiny", "vit_dlittle_patch16_reg1_gap_256"):
        for kind, fused in (("plain", False), ("fused", True)):
            encoder: Encoder = build_encoder(dataclasses.replace(SMALL, name=name, attention=kind), seed=0)
            encoder.set_attention("cpu")
            assert [block.attn.fused_attn for block in encoder.vit.blocks] == [fused] * 2
