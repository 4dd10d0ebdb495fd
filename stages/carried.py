"""The frozen weights on workers that do not see the run's folder: a worker that misses them says so by an error,
whoever runs the build packs them once, and from then on they lie in every worker's own folder under the hash of their
content. Stands beside `encode`; how they travel is the cluster's business."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from cache.errors import StaleCache
from models.vit import frozen_hash, frozen_names

CARRIED: dict[str, str] = {}
"""On a worker: the file of weights that came to it, by their hash."""


class WeightsUnseen(StaleCache):
    """A worker sees no file of these weights, or another's."""

    def __init__(self, file: str, cut: int, wanted: str, found: str) -> None:
        self.file, self.cut, self.wanted, self.found = file, cut, wanted, found
        if found:
            text = f"{file} has weights={found[:8]}… up to cut {cut}, the cache wants weights={wanted[:8]}…"
            super().__init__(f"{text}; run `make explain`")
        else:
            super().__init__(f"{file} is not there, the cache wants its weights={wanted[:8]}…; run `make explain`")

    def __reduce__(self) -> tuple[type[WeightsUnseen], tuple[Any, ...]]:
        return type(self), (self.file, self.cut, self.wanted, self.found)


def frozen_state(file: str, cut: int, wanted: str) -> dict[str, Tensor]:
    """The weights before block `cut`, and perhaps more, by timm's names, their hash checked. Raises WeightsUnseen."""
    try:
        state = load_file(CARRIED.get(wanted, file))
    except FileNotFoundError:
        raise WeightsUnseen(file, cut, wanted, "") from None
    if (found := frozen_hash(state, cut)) != wanted:
        raise WeightsUnseen(file, cut, wanted, found)
    return state


def packed(unseen: WeightsUnseen) -> bytes:
    """What a worker misses, and no more, as the content of a safetensors file. Raises WeightsUnseen where it is not
    here either."""
    state = frozen_state(unseen.file, unseen.cut, unseen.wanted)
    return save({name: state[name].contiguous() for name in frozen_names(state, unseen.cut)})


def unpack(folder: Path, digest: str, content: bytes) -> None:
    """Keep what has come to this worker in a folder of its own; whoever loads it checks its hash."""
    path = folder / f"{digest}.safetensors"
    if not path.exists() or path.read_bytes() != content:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    CARRIED[digest] = str(path)


def forget(folder: Path, digest: str) -> None:
    """Remove what `unpack` has kept."""
    CARRIED.pop(digest, None)
    (folder / f"{digest}.safetensors").unlink(missing_ok=True)
