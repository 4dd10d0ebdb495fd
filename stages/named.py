"""Data sets that are known by name, such as `cifar10`: torchvision's, downloaded where there is a network."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from stages.errors import DataError

TORCHVISION = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
    "stl10": "STL10",
    "flowers102": "Flowers102",
}
TORCHVISION_ROOT = Path("~/.cache/permafrost").expanduser()


@cache
def data_set(source: str) -> Any:
    """A torchvision data set, downloaded where there is a network; `cifar10:test` is its test set."""
    from torchvision import datasets

    name, _, split = source.partition(":")
    which: dict[str, Any] = {"split": split or "train"}
    if name in ("cifar10", "cifar100"):
        if split not in ("", "train", "test"):
            raise DataError(f"{source}: {name} has no part {split!r}; use {name}, or {name}:test for its test images")
        which = {"train": split != "test"}
    try:
        return getattr(datasets, TORCHVISION[name])(TORCHVISION_ROOT, download=True, **which)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{source} is not in {TORCHVISION_ROOT} and could not be downloaded ({reason}); give a folder or tars with "
            "DATA="
        ) from error
