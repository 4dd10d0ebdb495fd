"""Damage to caches that frozen blocks have made, found by `verify` and mended by the `repair` that ships, from its verb
down: the encoder, the workers, the manifest's copy. `tests.cache.trials` does it many times over."""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from cache.lock import aside
from pipeline import care, runner
from pipeline.job import Job
from pipeline.layout import RunPaths
from tests.cache.conftest import files_of
from tests.pipeline.toy import SMALL, toy

KINDS = ("flip", "truncate", "empty", "delete", "exchange", "lengthen", "lose")
MANIFEST = "manifest.json"

TINY = SMALL | {
    "data.limit": 8,
    "eval.train_limit": 8,
    "eval.val_limit": 8,
    "model.depth": 3,
    "schedule.cuts": [0, 1, 2],
    "schedule.epochs": [1, 1, 1],
    "mask.groups": 4,
    "train.batch_size": 4,
    "cache.shard_rows": 5,
    "cache.encode_batch": 3,
}

VARIANTS: dict[str, dict[str, object]] = {
    "zarr": {},
    "webdataset": {"cache.backend": "webdataset"},
    "zarr-int8-zstd": {"cache.codec": "int8", "cache.block": 8, "cache.filter": "zstd"},
    "webdataset-bfloat16": {"cache.backend": "webdataset", "cache.codec": "bfloat16"},
    "two-cuts": {},
}
"""Four shards of two views each; `two-cuts` has a second cache, which continues the first."""


@dataclass(frozen=True)
class Sound:
    """Sound caches, and the job that asks for them."""

    job: Job
    files: dict[str, bytes]

    @classmethod
    def build(cls, place: Path, variant: str) -> Sound:
        """Those of a variant. What a run has trained in `place` serves all variants that are built there."""
        paths = RunPaths(place / "run", place / variant)
        job = Job("toy", toy(**TINY | VARIANTS[variant]), paths, target=2 if variant == "two-cuts" else 1)
        with contextlib.redirect_stdout(io.StringIO()):
            runner.run_cache(job)
        return cls(job, kept(paths.cache_root))


def kept(store: Path) -> dict[str, bytes]:
    """Every file of every cache in a folder, and the copies of their manifests."""
    parts = [*store.glob("cut-*"), aside(store / "any", "manifests", "").parent]
    return {f"{part.name}/{name}": content for part in parts for name, content in files_of(part).items()}


def harm(kind: str, path: Path, place: int, mask: int, other: Path) -> set[Path]:
    """Damages a file at a place; the files that are no longer as they were."""
    content = path.read_bytes()
    at = place % len(content)
    if kind == "flip":
        path.write_bytes(content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :])
    elif kind == "truncate":
        path.write_bytes(content[:at])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "lengthen":
        path.write_bytes(content + bytes([mask]))
    elif kind == "delete":
        path.unlink()
    elif kind == "exchange" and other.read_bytes() != content:
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return {path, other}
    elif kind == "exchange":  # two files of the same content: no damage, so take the mildest other one
        return harm("flip", path, place, mask, other)
    elif kind == "lose":  # the manifest of the file's cache, and the copy by which it would be mended
        folder = next(parent for parent in path.parents if parent.name.startswith("cut-"))
        harm("truncate", aside(folder, "manifests", ".json"), place, mask, other)
        return harm("flip", folder / MANIFEST, place, mask, other)
    return {path}


def damage_trial(
    sound: Sound, store: Path, kind: str, picks: tuple[int, int], place: int, mask: int
) -> tuple[bool, bool]:
    """(found, mended) of one damage done to a copy of sound caches in `store`: found is that `verify` names the files
    that were harmed and no others, mended that `repair` leaves every file as it was, to the bit."""
    shutil.copytree(sound.job.paths.cache_root, store)
    folders = sorted(store.glob("cut-*"))
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    path, other = (files[pick % len(files)] for pick in picks)
    harmed = harm(kind, path, place, mask, other)
    # Of a cache whose manifest is bad nothing else is believed, nor looked at.
    blind = {file.parent for file in harmed if file.name == MANIFEST}
    seen = {folder / damage.file for folder in folders for damage in care.check(folder)}
    found = seen == {file for file in harmed if file.name == MANIFEST or blind.isdisjoint(file.parents)}
    with contextlib.redirect_stdout(io.StringIO()):
        care.run_repair(replace(sound.job, paths=replace(sound.job.paths, caches=store)))
    return found, kept(store) == sound.files
