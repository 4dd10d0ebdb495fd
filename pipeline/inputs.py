"""What the outcome of a part of a run depends on, by the setting's name: as a fingerprint, and its changes in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from models.spec import digest


def named(prefix: str, settings: Any, without: frozenset[str] | set[str] = frozenset()) -> dict[str, Any]:
    """A section's settings by their full names."""
    return {f"{prefix}.{name}": value for name, value in asdict(settings).items() if name not in without}


def difference(had: Mapping[str, Any], wants: Mapping[str, Any]) -> str:
    """The inputs that changed: `train.lr: 0.001 -> 0.002`; a setting that came or went shows as `(none)`."""
    changed = [
        f"{name}: {_short(had.get(name, '(none)'))} -> {_short(wants.get(name, '(none)'))}"
        for name in sorted(had.keys() | wants.keys())
        if had.get(name, "(none)") != wants.get(name, "(none)")
    ]
    return ", ".join(changed)


def inputs_digest(inputs: Mapping[str, Any]) -> str:
    """The fingerprint of a stage or arm."""
    return digest(dict(inputs))


def _short(value: Any) -> str:
    text = str(value)
    return f"{text[:8]}…" if len(text) == 64 and all(c in "0123456789abcdef" for c in text) else text
