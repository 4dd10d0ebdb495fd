"""Several attempts at one shard: the first that is complete wins, whole, and nobody writes over it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest

from cache import attempts
from cache.errors import CacheError, MissingCache
from cache.layout import Shard
from cache.manifest import ShardEntry, read_manifest
from cache.place import place_of
from cache.receipts import read_receipt, receipt_name
from cache.writer import create_store, drop_receipts, finish, missing_shards, write_rows

SHARD = Shard(0, 0, 3)


def attempt(example: Any, folder: Path, add: float = 0.0) -> list[ShardEntry]:
    """Write the first shard; `add` makes of it what another kind of processor might."""
    block = example.block(SHARD)
    return write_rows(folder, example.layout, 0, 0, replace(block, features_NLD=block.features_NLD + np.float32(add)))


def start(example: Any, folder: Path) -> Path:
    create_store(folder, example.layout, example.labels_N, example.keys, example.digests_N)
    return folder


def contents(folder: Path, entries: list[ShardEntry]) -> list[bytes]:
    return [(folder / entry.name).read_bytes() for entry in entries]


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_the_second_attempt_is_thrown_away(example: Callable[..., Any], tmp_path: Path, backend: str) -> None:
    wanted = example()
    wanted = replace(wanted, layout=replace(wanted.layout, backend=backend))
    folder = start(wanted, tmp_path / "cache")
    first = attempt(wanted, folder)
    before = contents(folder, first)
    assert attempt(wanted, folder, add=1.0) == first and contents(folder, first) == before
    assert not list(folder.rglob("*.tmp"))


def test_attempts_that_end_together_do_not_mix(example: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    wanted = example()
    folder = start(wanted, tmp_path / "cache")
    plain, together, found = attempts.hold_shard, Barrier(4), []

    @contextmanager
    def held(*args: Any) -> Any:
        together.wait(20)  # all four are written under names of their own
        with plain(*args):
            yield

    monkeypatch.setattr(attempts, "hold_shard", held)
    adds = (0.0, 1.0, 2.0, 3.0)
    threads = [Thread(target=lambda add=add: found.append(attempt(wanted, folder, add)), daemon=True) for add in adds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4 and all(entries == found[0] for entries in found)
    assert read_receipt(folder, wanted.layout, receipt_name(SHARD)) == tuple(found[0])
    assert SHARD not in missing_shards(folder, wanted.layout) and not list(folder.rglob("*.tmp"))


def test_an_attempt_that_fails_leaves_nothing(example: Callable[..., Any], tmp_path: Path, monkeypatch: Any) -> None:
    wanted = example()
    folder = start(wanted, tmp_path / "cache")

    @contextmanager
    def held(*args: Any) -> Any:
        raise CacheError("no lock")
        yield

    before = sorted(folder.rglob("*"))
    with monkeypatch.context() as patch, pytest.raises(CacheError, match="no lock"):
        patch.setattr(attempts, "hold_shard", held)
        attempt(wanted, folder)
    assert [path for path in sorted(folder.rglob("*")) if path.is_file()] == [path for path in before if path.is_file()]


def test_a_finished_cache_takes_no_late_attempt_but_what_is_damaged(
    example: Callable[..., Any], tmp_path: Path, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    wanted = example()
    folder = tmp_path / "cache"
    manifest, _ = wanted.build(folder)
    whole = tree(folder)
    entries = attempt(wanted, folder, add=1.0)
    assert [entry.name for entry in entries] == wanted.layout.files(SHARD) and set(entries) < set(manifest.shards)
    other = replace(wanted, layout=replace(wanted.layout, shard_rows=7))
    assert write_rows(folder, other.layout, 0, 0, other.block(Shard(0, 0, 7))) == []  # of a build with other shards
    assert tree(folder) == whole
    bad = folder / entries[0].name
    bad.write_bytes(b"\0" * 10)
    assert attempt(wanted, folder) == entries
    drop_receipts(folder)
    assert tree(folder) == whole and read_manifest(folder) == manifest


def test_in_an_object_store_too(example: Callable[..., Any]) -> None:
    wanted = example()
    folder = start(wanted, place_of("memory://attempts/cut-3"))
    first = attempt(wanted, folder)
    before = contents(folder, first)
    assert attempt(wanted, folder, add=1.0) == first and contents(folder, first) == before
    for shard in missing_shards(folder, wanted.layout):
        write_rows(folder, wanted.layout, shard.view, shard.first_row, wanted.block(shard))
    finish(folder, wanted.layout)
    assert attempt(wanted, folder, add=1.0) == first and contents(folder, first) == before


def test_a_folder_that_is_not_there_is_not_made(example: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(MissingCache, match="all workers must see the caches"):
        attempt(example(), tmp_path / "not" / "mounted")
    assert not list(tmp_path.iterdir())


def test_a_shard_is_told_by_its_numbers_and_the_list_of_all_stays_at_home(example: Callable[..., Any]) -> None:
    import pickle

    layout = replace(example().layout, num_samples=1_000_000, shard_rows=10)
    size = len(pickle.dumps(layout))
    assert all(map(layout.holds, (*layout.shards[:2], layout.shards[-1]))) and len(layout.shards) == 200_000
    assert not any(map(layout.holds, (Shard(0, 5, 10), Shard(2, 0, 10), Shard(0, 0, 9), Shard(0, 1_000_000, 10))))
    assert not layout.holds(Shard(0, -10, 10)) and len(pickle.dumps(layout)) == size < 2_000
    assert pickle.loads(pickle.dumps(layout)) == layout
