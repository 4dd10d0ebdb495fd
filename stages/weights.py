"""Checkpoint files to start from, here or behind a URL: read without running anything in them, and known by their
contents. Stands before stage 0. Free of torch until a file is read, so that a call that only decides can ask for a
file's digest."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.checksum import sha256_of
from cache.errors import CacheError
from cache.manifest import atomic_write, seal, unseal
from cache.place import blocks_of, describe, is_there, path_or_url, place_of, read_bytes, size_of
from models.config import Normalisation
from stages.stamps import let_the_clock_tick, stamp_of

if TYPE_CHECKING:
    from models.vit import Encoder

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


class WeightsError(ValueError):
    """A checkpoint file that is not there or cannot be read."""


def load_weights(encoder: Encoder, path: str, digest: str = "") -> list[str]:
    """Load a checkpoint file into an encoder; returns what was left out or changed, in words. `digest` is what its
    content was known by, when the run began.

    Raises WeightsError, StoreUnreachable, or ModelError for a key that does not fit.
    """
    from models.weights import encoder_state

    state, notes = encoder_state(read_checkpoint(path, digest), encoder.vit, path)
    encoder.vit.load_state_dict(state)
    return notes


def read_checkpoint(path: str, digest: str = "") -> Mapping[str, Any]:
    """What a file holds. torch's own format is read with `weights_only`: no code in it runs. Raises WeightsError."""
    path = path_or_url(path)
    _stamp(path)
    if "://" not in path:
        content = _read(path, path)
        _require(Path(path), path, digest)  # afterwards: also what was put there while it was read is another file
        return content
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / f"weights{Path(path).suffix}"
        place = place_of(path)
        with local.open("wb") as file:
            for block in blocks_of(place, size_of(place)):
                file.write(block)
        _require(local, path, digest)
        return _read(str(local), path)


def _require(file: Path, path: str, digest: str) -> None:
    """That a file on disk, which the settings call `path`, is the one that the run began with."""
    if digest and sha256_of(file, 0) != digest:
        raise WeightsError(f"model.weights={path} was changed since the run began; run again, which takes it anew")


def _read(file: str, path: str) -> Mapping[str, Any]:
    """The same of a file on disk, which the settings call `path`."""
    import torch
    from safetensors.torch import load_file

    try:
        if file.endswith(".safetensors"):
            return load_file(file)
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE and DINO keep their arguments in one
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on a file that is none, pickle raises more than it says
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]  # some say nothing but a number
        raise WeightsError(
            f"model.weights={path} cannot be read as plain tensors ({reason}); where it is whole, save its state_dict()"
        ) from error
    if not isinstance(content, Mapping):
        raise WeightsError(f"model.weights={path} holds a {type(content).__name__}, not a state; save its state_dict()")
    return content


def stated_beside(path: str) -> Normalisation | None:
    """The normalisation that a `config.json` beside a file states, as in folders that timm or `export` wrote; None
    where there is none, it does not say, or a store does not answer, as some do where nothing is."""
    try:
        card = json.loads(read_bytes(place_of(path).parent / "config.json"))
        stated = card.get("pretrained_cfg", card)
        mean, std = (tuple(map(float, stated[name])) for name in ("mean", "std"))
    except (OSError, CacheError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return (mean, std) if len(mean) == len(std) == 3 else None


def weights_digest(path: str, index_file: Path | None) -> str:
    """sha256 of a file's content, hex; kept in `index_file` by what its stamp says, so that it is read once.

    A file that was read and is gone since is still the file that it was. Raises WeightsError.
    """
    try:
        kept = unseal(index_file.read_bytes()) if index_file else {}
    except (OSError, ValueError):
        kept = {}
    path = path_or_url(path)
    place = place_of(path)
    if kept.get("path") == _name(path) and not is_there(place):
        return str(kept["sha256"])
    stamp = _stamp(path)
    if kept.items() >= stamp.items():
        return str(kept["sha256"])
    let_the_clock_tick(int(stamp.get("changed", 0)))
    found = sha256_of(place, int(stamp["size"]))
    if _stamp(path) != stamp:
        raise WeightsError(f"model.weights={path} was changed while it was read; run again when nothing writes to it")
    if index_file:
        atomic_write(index_file, seal(stamp | {"sha256": found}))
    return found


def _stamp(path: str) -> dict[str, str | int]:
    """By what a file is known again; WeightsError when there is none of a known kind."""
    if "://" in path:
        return _stamp_of_object(path)
    file = Path(path)
    if not file.is_file():
        kind = "a folder" if file.is_dir() else "no file"
        raise WeightsError(f"model.weights={path} is {kind}; give a checkpoint file ({', '.join(SUFFIXES)})")
    if file.suffix not in SUFFIXES:
        raise WeightsError(f"model.weights={path} is none of {', '.join(SUFFIXES)}; save the state as one of them")
    return {"path": str(file.absolute()), **stamp_of(file)._asdict()}


def _stamp_of_object(path: str) -> dict[str, str | int]:
    found = describe(place_of(path))
    if found is None:
        raise WeightsError(f"model.weights={path} is no file; give a checkpoint file ({', '.join(SUFFIXES)})")
    if Path(path).suffix not in SUFFIXES:
        raise WeightsError(f"model.weights={path} is none of {', '.join(SUFFIXES)}; save the state as one of them")
    return {"path": path, "size": found[0], "version": found[1]}


def _name(path: str) -> str:
    """What the index calls a file."""
    return path if "://" in path else str(Path(path).absolute())
