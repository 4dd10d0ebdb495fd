"""What a cached feature is: every setting that can change a number in a cache, and the fingerprint over them. Also the
two functions under every identity and every random number of the project: `digest` and `derive_seed`. Free of torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from typing import Any

COMPUTATION_VERSION = 1
"""Bumped when the frozen forward gives other numbers for a reason that no field of FeatureSpec tells."""

LATER_FIELDS = frozenset({"prefix", "block", "keepbits", "first_view", "normalisation"})
WHICH_FIELDS = ("data", "views", "first_view", "parent")
"""What a spec says of which samples and views there are, not of how they are made."""


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces. NaN and infinity have none and are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON, hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed from named parts, for instance `derive_seed(seed, "mask", step)`; the same on every machine."""
    text = canonical_json(list(parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class FeatureSpec:
    """The identity of a cache. Two caches with equal specs hold equal numbers."""

    model: str
    """Architecture, by timm's name."""
    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    weights: str
    """sha256 of the patch embedding, the positions and the blocks before the cut."""
    cut: int
    """Index of the first block that has not run."""
    groups: int
    """Token groups that ran through the blocks separately."""
    mask_ratio: float
    mask_block: int
    """Side, in tokens, of the squares that a group is made of; 1 where there is one group."""
    views: int
    view_transform: str
    """How a view is cut from an image, with its version."""
    data: str
    """Digest of the list of samples and their contents."""
    seed: int
    dtype: str
    """Precision of the frozen forward: float32 or bfloat16 (autocast)."""
    codec: str
    """How a feature is stored."""
    pixels: bool
    """Whether the uint8 pixels of every token are stored beside the features."""
    parent: str
    """Fingerprint of the cache that this one was built from; empty when built from images."""
    version: int
    prefix: int = 0
    """Class and register tokens of the model, stored once for every group."""
    block: int = 0
    """Channels that share a scale; with codec int8 only."""
    keepbits: int = 0
    """Mantissa bits that bit rounding left; 0 where features were not rounded further than the codec does."""
    first_view: int = 0
    """The first of the views that are kept; above 0 in a ring, whose oldest views have been replaced."""
    normalisation: str = ""
    """Mean and standard deviation that images were normalised with; empty for ImageNet's."""

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def fingerprint(self) -> str:
        """sha256 over all fields, hex."""
        return digest(self.to_dict())

    def kin(self, parent: str = "") -> str:
        """Caches of one kin hold equal numbers for equal samples and views. parent: the kin of the one continued."""
        made = {name: value for name, value in self.to_dict().items() if name not in WHICH_FIELDS}
        return digest(made | {"parent": parent})

    def view_at(self, slot: int) -> int:
        """The view that lies in a slot: view v is always in slot v mod views, so that a new one takes the oldest's."""
        return self.first_view + (slot - self.first_view) % self.views

    def slot_of(self, view: int) -> int | None:
        """Where a view lies; None where it is not kept."""
        return view % self.views if self.first_view <= view < self.first_view + self.views else None

    def differences(self, other: FeatureSpec) -> list[tuple[str, Any, Any]]:
        """(field, mine, theirs) of every field that differs, in the order of the fields."""
        mine, theirs = asdict(self), asdict(other)
        return [(name, mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]]

    def to_dict(self) -> dict[str, Any]:
        """The record; fields that came later are left out where they are 0 or empty, as in every cache before them."""
        return {name: value for name, value in asdict(self).items() if name not in LATER_FIELDS or value}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FeatureSpec:
        """The reverse of `to_dict`. Raises ValueError naming an unknown or missing field."""
        names = {field.name for field in fields(cls)}
        if unknown := sorted(values.keys() - names):
            raise ValueError(f"feature spec has unknown field {unknown[0]}; it was written by another version")
        if missing := sorted(names - values.keys() - LATER_FIELDS):
            raise ValueError(f"feature spec lacks field {missing[0]}; it was written by another version")
        return cls(**values)
