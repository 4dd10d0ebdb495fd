"""Caches that an earlier version made: read, verified and mended as they are, with the checksums that they have."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from cache import open_cache
from cache.manifest import atomic_write, read_manifest, seal
from cache.receipts import RECEIPTS, STORE_RECEIPT, receipt_name, write_receipt
from cache.verify import drop_manifest, verify_cache
from cache.writer import amend, missing_shards, write_rows
from tests.cache.trials import BACKENDS, of_backend


@pytest.fixture(scope="module", params=BACKENDS)
def wanted(request):
    return of_backend(request.param)


@pytest.fixture(scope="module")
def whole(wanted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    wanted.build(folder)
    return folder


@pytest.fixture
def earlier(whole: Path, tmp_path: Path) -> Path:
    """The same cache as format 3 has it: a sha256 of every file."""
    folder = shutil.copytree(whole, tmp_path / "earlier")
    manifest = read_manifest(folder)
    entries = [
        replace(entry, checksum=hashlib.sha256((folder / entry.name).read_bytes()).hexdigest())
        for entry in manifest.shards
    ]
    atomic_write(folder / "manifest.json", seal(replace(manifest, shards=tuple(entries), format=3).to_dict()))
    return folder


def test_every_file_has_its_blake3(whole: Path) -> None:
    manifest = read_manifest(whole)
    assert manifest.format == 4 and len(manifest.shards) > 4
    for entry in manifest.shards:
        assert entry.checksum == f"blake3:{blake3((whole / entry.name).read_bytes()).hexdigest()}"


def test_a_cache_of_format_3_is_read_and_its_damage_found(whole: Path, earlier: Path) -> None:
    rows = np.arange(5)
    ours, theirs = open_cache(whole).read(rows, 1), open_cache(earlier, verify=True).read(rows, 1)
    assert np.array_equal(ours.features_BLD.numpy(), theirs.features_BLD.numpy())
    assert verify_cache(earlier) == []
    name = read_manifest(earlier).shards[-1].name
    content = bytearray((earlier / name).read_bytes())
    content[7] ^= 4
    (earlier / name).write_bytes(content)
    assert [(damage.file, damage.what) for damage in verify_cache(earlier)] == [(name, "is altered")]


def test_a_shard_of_format_3_that_is_written_again_is_what_it_was(earlier: Path, wanted) -> None:
    before = read_manifest(earlier)
    shard = wanted.layout.shards[2]
    for name in wanted.layout.files(shard):
        (earlier / name).unlink()
    write_rows(earlier, wanted.layout, shard.view, shard.first_row, wanted.block(shard))
    assert amend(earlier)
    assert read_manifest(earlier) == before and verify_cache(earlier) == []


def test_a_shard_of_format_3_that_became_another_is_told(earlier: Path, wanted) -> None:
    shard = wanted.layout.shards[2]
    for name in wanted.layout.files(shard):
        (earlier / name).unlink()
    block = wanted.block(shard)
    write_rows(earlier, wanted.layout, shard.view, shard.first_row, replace(block, features_NLD=-block.features_NLD))
    assert not amend(earlier) and verify_cache(earlier) == []


def test_a_half_built_cache_of_format_3_goes_on_where_it_was(whole: Path, earlier: Path, wanted, tree) -> None:
    """Receipts of format 3 are believed, and what is finished then says both kinds of checksums."""
    entries = read_manifest(earlier).shards
    parts = {receipt_name(shard): wanted.layout.files(shard) for shard in wanted.layout.shards}
    parts[STORE_RECEIPT] = [entry.name for entry in entries if not entry.rows]
    gone, *_ = parts.pop(receipt_name(wanted.layout.shards[1]))
    (earlier / gone).unlink()
    for receipt, names in parts.items():
        write_receipt(earlier, wanted.layout, receipt, [entry for entry in entries if entry.name in names])
    drop_manifest(earlier)
    for receipt in (earlier / RECEIPTS).iterdir():
        text = receipt.read_bytes().replace(b'"format": 4', b'"format": 3')
        assert b'"format": 3' in text
        body = text[: text.rindex(b',\n "checksum"')]
        receipt.write_bytes(body + f',\n "checksum": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode())
    assert missing_shards(earlier, wanted.layout) == [wanted.layout.shards[1]]
    _, built = wanted.build(earlier)
    assert built == [wanted.layout.shards[1]] and verify_cache(earlier) == []
    assert {name: content for name, content in tree(earlier).items() if name != "manifest.json"} == {
        name: content for name, content in tree(whole).items() if name != "manifest.json"
    }
    kinds = {entry.checksum.partition(":")[0] == "blake3" for entry in read_manifest(earlier).shards}
    assert kinds == {True, False}
