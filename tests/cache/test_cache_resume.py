from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache import open_cache
from cache.errors import CacheError, MissingCache, StaleCache, Unrepresentable
from cache.layout import Shard
from cache.writer import create_store, finish, missing_shards, write_rows


def test_the_order_of_writing_does_not_matter(tmp_path: Path, example, tree) -> None:
    wanted = example()
    wanted.build(tmp_path / "a")
    create_store(tmp_path / "b", wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    for shard in reversed(wanted.layout.shards):
        write_rows(tmp_path / "b", wanted.layout, shard.view, shard.first_row, wanted.block(shard))
    finish(tmp_path / "b", wanted.layout)
    assert tree(tmp_path / "b") == tree(tmp_path / "a")


@pytest.mark.parametrize("left", ["temporary", "torn"])
def test_killed_anywhere_it_resumes_and_ends_the_same(tmp_path: Path, example, tree, monkeypatch, left: str) -> None:
    wanted = example(num_samples=5, shard_rows=2, groups=2, pixels=False)
    writes: list[tuple[str, bytes]] = []
    plain = Path.replace

    def replace_and_note(source: Path, target: Path) -> Path:
        if target.is_relative_to(tmp_path / "whole"):  # a copy of the manifest lies beside it
            writes.append((target.relative_to(tmp_path / "whole").as_posix(), source.read_bytes()))
        return plain(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_and_note)
        wanted.build(tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    assert writes[-1][0] == "manifest.json"

    for kill in range(len(writes) + 1):
        folder = tmp_path / f"killed-{kill}"
        for name, content in writes[:kill]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for name, content in writes[kill : kill + 1]:
            if left == "torn" and name == "manifest.json":
                continue  # the rename is atomic; a torn manifest is damage, tested elsewhere
            path = folder / name if left == "torn" else (folder / name).with_name(f".{Path(name).name}.0.tmp")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content[: len(content) // 2])
        receipts = sum(name.startswith("receipts/view") for name, _ in writes[:kill])
        _, built = wanted.build(folder)
        assert built == list(wanted.layout.shards[receipts:])
        assert tree(folder) == whole


def test_a_second_build_writes_nothing(tmp_path: Path, example) -> None:
    wanted = example()
    wanted.build(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    _, built = wanted.build(tmp_path)
    assert built == []
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_resume_hashes_again(tmp_path: Path, example) -> None:
    wanted = example()
    create_store(tmp_path, wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    for shard in wanted.layout.shards:
        write_rows(tmp_path, wanted.layout, shard.view, shard.first_row, wanted.block(shard))
    assert missing_shards(tmp_path, wanted.layout) == []
    path = tmp_path / "data.zarr/view_0/pixels/c/2/0/0"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    assert missing_shards(tmp_path, wanted.layout) == [Shard(view=0, first_row=6, rows=1)]


def test_an_unfinished_cache_is_refused(tmp_path: Path, example) -> None:
    wanted = example()
    create_store(tmp_path, wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    for shard in wanted.layout.shards[:4]:
        write_rows(tmp_path, wanted.layout, shard.view, shard.first_row, wanted.block(shard))
    with pytest.raises(MissingCache, match="is unfinished"):
        open_cache(tmp_path)
    with pytest.raises(CacheError, match="lacks 2 of 7 parts, first view_1-000000003"):
        finish(tmp_path, wanted.layout)


def test_receipts_of_another_seed_or_shard_size_do_not_count(tmp_path: Path, example, tree) -> None:
    old, other_seed, other_size = example(seed=1), example(), example(shard_rows=2)
    create_store(tmp_path / "a", old.layout, old.labels_N, old.keys, old.digests_N)
    for shard in old.layout.shards:
        write_rows(tmp_path / "a", old.layout, shard.view, shard.first_row, old.block(shard))
    assert missing_shards(tmp_path / "a", other_seed.layout) == list(other_seed.layout.shards)
    other_size.build(tmp_path / "a")
    assert missing_shards(tmp_path / "a", other_size.layout) == []
    other_seed.build(tmp_path / "b")
    smaller = example(shard_rows=7)
    create_store(tmp_path / "c", other_seed.layout, other_seed.labels_N, other_seed.keys, other_seed.digests_N)
    shard = other_seed.layout.shards[1]
    write_rows(tmp_path / "c", other_seed.layout, shard.view, shard.first_row, other_seed.block(shard))
    smaller.build(tmp_path / "c")
    smaller.build(tmp_path / "d")
    assert tree(tmp_path / "c") == tree(tmp_path / "d")


def test_building_over_another_finished_cache_is_refused(tmp_path: Path, example) -> None:
    example().build(tmp_path)
    other = example(weights="91" * 32)
    with pytest.raises(StaleCache, match="cache holds weights=3f3f3f3f…, wanted weights=91919191…; run `make explain`"):
        other.build(tmp_path)


@pytest.mark.parametrize(
    ("value", "shown", "remedy"),
    [
        (65520.0, "65520", "cut earlier"),
        (-1e9, "-1e\\+09", "cut earlier"),
        (np.nan, "nan", "the encoder has diverged"),
        (-np.inf, "-inf", "the encoder has diverged"),
    ],
)
def test_what_float16_cannot_hold_is_refused(
    tmp_path: Path, example, tree, value: float, shown: str, remedy: str
) -> None:
    wanted = example()
    shard = wanted.layout.shards[4]
    wanted.features_VNLD[1, 4, 9, 2] = value
    token = wanted.token_ids_VNL[1, 4, 9]
    create_store(tmp_path, wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    before = tree(tmp_path)
    message = f"sample 'sämple/4' view 1 token {token} channel 2: feature {shown} at cut 3 .*at most 65504\\); {remedy}"
    with pytest.raises(Unrepresentable, match=message) as caught:
        write_rows(tmp_path, wanted.layout, shard.view, shard.first_row, wanted.block(shard))
    assert "\n" not in str(caught.value)
    assert shard in missing_shards(tmp_path, wanted.layout)
    assert tree(tmp_path) == before, "not even a part of the shard is left"


def test_the_largest_float16_is_kept(tmp_path: Path, example) -> None:
    wanted = example()
    wanted.features_VNLD[0, 0, 0, :2] = 65504.0, 65519.9
    wanted.build(tmp_path)
    assert open_cache(tmp_path).read([0]).features_BLD[0, 0, :2].tolist() == [65504.0, 65504.0]
    assert open_cache(tmp_path).manifest.stats[0].max_abs == 65504.0


def test_one_writer_per_shard_is_asserted(tmp_path: Path, example) -> None:
    wanted = example()
    for first, rows in ((1, 3), (0, 2), (6, 3)):
        block = wanted.block(Shard(0, first, min(rows, 7 - first)))
        if rows > len(block.keys):
            block = replace(block, keys=("k",) * rows)
        with pytest.raises(AssertionError, match="one writer per shard"):
            write_rows(tmp_path, wanted.layout, 0, first, block)


def test_a_full_disk_is_one_line(tmp_path: Path, example, monkeypatch, tree) -> None:
    wanted = example()
    create_store(tmp_path, wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    before = tree(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(CacheError, match=r"cannot write .*/0 \(\d+ bytes\): No space left"),
    ):
        patch.setattr("cache.manifest.os.fsync", full)
        write_rows(tmp_path, wanted.layout, 0, 0, wanted.block(wanted.layout.shards[0]))
    assert tree(tmp_path) == before
