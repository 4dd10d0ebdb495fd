"""FeatureSpec and the two functions under every identity and every random number."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest

from models.spec import LATER_FIELDS, FeatureSpec, canonical_json, derive_seed, digest

REPOSITORY = Path(__file__).parents[2]
SPEC = FeatureSpec(
    model="vit_tiny_patch16_224",
    image_size=224,
    patch_size=16,
    width=192,
    depth=12,
    heads=3,
    weights="3f" * 32,
    cut=3,
    groups=4,
    mask_ratio=0.75,
    mask_block=1,
    views=2,
    view_transform="crop-1",
    data="d4" * 32,
    seed=0,
    dtype="float32",
    codec="float16",
    pixels=True,
    parent="",
    version=1,
    prefix=1,
    block=32,
    keepbits=5,
    first_view=3,
    normalisation="mean 0.5,0.5,0.5 std 0.5,0.5,0.5",
)


def other(value: Any) -> Any:
    """Another value of the same type."""
    return not value if isinstance(value, bool) else value + "x" if isinstance(value, str) else value + 1


def test_survives_a_trip_through_json() -> None:
    again = FeatureSpec.from_dict(json.loads(json.dumps(SPEC.to_dict())))
    assert again == SPEC and again.fingerprint == SPEC.fingerprint
    assert list(SPEC.to_dict()) == [field.name for field in fields(FeatureSpec)]


@pytest.mark.parametrize("field", ["prefix", "block", "keepbits", "first_view", "normalisation"])
def test_a_cache_without_a_later_field_is_recorded_as_before_there_was_any(field: str) -> None:
    value = getattr(SPEC, field)
    nothing = type(value)()
    plain = replace(SPEC, **{field: nothing})
    assert field not in plain.to_dict() and FeatureSpec.from_dict(plain.to_dict()) == plain
    assert plain.differences(SPEC) == [(field, nothing, value)]
    assert SPEC.differences(plain) == [(field, value, nothing)]


def test_holds_every_setting_that_can_change_a_number() -> None:
    names = """model image_size patch_size width depth heads weights cut groups mask_ratio mask_block views
        view_transform data seed dtype codec pixels parent version prefix block keepbits first_view normalisation"""
    assert {field.name for field in fields(FeatureSpec)} == set(names.split())


@pytest.mark.parametrize("name", SPEC.to_dict())
def test_each_field_changes_the_fingerprint_and_is_named(name: str) -> None:
    mine = getattr(SPEC, name)
    changed = replace(SPEC, **{name: other(mine)})
    assert changed.fingerprint != SPEC.fingerprint
    assert SPEC.differences(changed) == [(name, mine, other(mine))]


@pytest.mark.parametrize("name", sorted(SPEC.to_dict().keys() - LATER_FIELDS))
def test_a_missing_field_is_named(name: str) -> None:
    values = SPEC.to_dict()
    del values[name]
    with pytest.raises(ValueError, match=rf"lacks field {name};"):
        FeatureSpec.from_dict(values)


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown field colour;"):
        FeatureSpec.from_dict(SPEC.to_dict() | {"colour": 1})


def test_differences_come_in_the_order_of_the_fields() -> None:
    changed = replace(SPEC, codec="int8", cut=6, model="vit_base")
    assert [name for name, _, _ in SPEC.differences(changed)] == ["model", "cut", "codec"]
    assert SPEC.differences(SPEC) == []


def test_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        SPEC.cut = 6  # type: ignore[misc]


@pytest.mark.parametrize(("size", "patch", "tokens"), [(224, 16, 196), (32, 4, 64)])
def test_num_tokens(size: int, patch: int, tokens: int) -> None:
    assert replace(SPEC, image_size=size, patch_size=patch).num_tokens == tokens


def test_canonical_json_has_one_text_for_one_value() -> None:
    assert canonical_json({"b": [1, 2.5], "a": {"d": None, "c": True}}) == '{"a":{"c":true,"d":null},"b":[1,2.5]}'
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            canonical_json(value)


def test_digest_is_the_sha256_of_the_canonical_json() -> None:
    assert digest({"b": 1, "a": "é"}) == hashlib.sha256(rb'{"a":"\u00e9","b":1}').hexdigest()


def test_seeds_are_the_same_on_every_machine() -> None:
    # Written down once: another value would draw other masks and crops in every existing run.
    assert derive_seed(0, "mask", 3) == 2905501657660364921
    assert derive_seed(1, "encoder") == 8634881768551748191


def test_seeds_have_63_bits_and_no_two_lists_of_parts_share_one() -> None:
    parts: list[tuple[str | int, ...]] = [
        (),
        (1,),
        ("1",),
        (1, 2),
        (12,),
        ("1", "2"),
        ("1,2",),
        ("12",),
        ("",),
        ("", ""),
    ]
    parts += [("mask", step) for step in range(2000)]
    seeds = [derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert min(seeds) >= 0 and 2**62 < max(seeds) < 2**63


def test_identity_and_spec_need_no_torch() -> None:
    code = (
        "import sys, models.spec; from models.config import ModelConfig; from models.identity import model_identity;"
        "model_identity(ModelConfig());"
        "print([name for name in ('torch', 'timm', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "[]\n"
