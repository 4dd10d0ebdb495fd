"""Running the frozen blocks once: from images or from an earlier cache, in one process or several, in one go or two."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Condition, Lock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache import backends, open_cache, reader
from cache.errors import CacheError, StaleCache, Unrepresentable
from cache.layout import Layout, Shard
from cache.manifest import CacheManifest, write_manifest
from cache.writer import create_store
from models.config import ModelConfig
from models.mim import raster_order
from models.targets import normalize_images, patchify
from models.vit import Encoder, build_encoder, frozen_hash
from stages import encode
from stages.config import DataConfig
from stages.encode import EncodeJob, Part, build, encode_rows, encode_shard
from stages.images import open_data
from stages.views import image_batch
from tests.encoding import encode_job, tiny_spec

MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=4, heads=2)
DATA = DataConfig(limit=30)
IMAGES = open_data(DATA).train


def serial(function: Callable[[object], Shard], tasks: Sequence[object]) -> Iterator[Shard]:
    return map(function, tasks)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(MODEL, seed=3).eval()


@pytest.fixture(scope="module")
def weights(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(encoder.vit.state_dict(), path)
    return path


def job(folder: Path, weights: Path, encoder: Encoder, cut: int, groups: int, parent: Path | None = None) -> EncodeJob:
    continued = open_cache(parent).manifest.fingerprint if parent else ""
    weights_hash = frozen_hash(encoder.vit.state_dict(), cut)
    spec = tiny_spec(IMAGES, DATA, weights_hash, cut, groups=groups, pixels=True, parent=continued)
    return encode_job(folder, Layout(spec, len(IMAGES), shard_rows=12), MODEL, DATA, weights, batch=5, parent=parent)


def built(one: EncodeJob) -> Path:
    assert list(build(one, IMAGES, serial))[-1] == (6, 6)
    return Path(one.folder)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_cache_holds_what_the_frozen_blocks_compute(
    tmp_path: Path, weights: Path, encoder: Encoder, groups: int
) -> None:
    cache = open_cache(built(job(tmp_path / "a", weights, encoder, 2, groups)))
    rows = [29, 0, 13]
    for view in (0, 1):
        pixels, crops = image_batch(IMAGES, rows, view, DATA, 16, seed=5)
        batch = cache.read(rows, view)
        assert (
            batch.keys == tuple(IMAGES.keys[row] for row in rows)
            and batch.labels_B.tolist() == IMAGES.labels[rows].tolist()
        )
        assert batch.pixels_BLP is not None and torch.equal(batch.pixels_BLP, patchify(torch.from_numpy(pixels), 4))
        np.testing.assert_array_equal(cache.crops(rows, view), crops)
        with torch.inference_mode():
            tokens = encoder.embed(normalize_images(torch.from_numpy(pixels)))
        for sample in range(3):
            for group in range(groups):
                part = cache.read([rows[sample]], view, group)
                with torch.inference_mode():
                    want = encoder.run(tokens[sample : sample + 1, part.ids_BL[0]], 0, 2)
                torch.testing.assert_close(part.features_BLD, want, rtol=1e-3, atol=1e-3)
        assert sorted(batch.ids_BL[0].tolist()) == list(range(16))
        whole = raster_order(batch.features_BLD, batch.ids_BL)
        assert whole.shape == (3, 16, 24) and (groups > 1 or torch.equal(whole, batch.features_BLD))


def test_a_cache_of_a_cache_is_that_of_the_images_but_for_rounding(
    tmp_path: Path, weights: Path, encoder: Encoder
) -> None:
    first = built(job(tmp_path / "one", weights, encoder, 1, 4))
    chained = open_cache(built(job(tmp_path / "chained", weights, encoder, 3, 4, parent=first)))
    links = [link for link in Path("/proc/self/fd").iterdir() if os.path.lexists(link)]
    assert not any(os.readlink(link).startswith(str(first)) for link in links), "it may be removed, and makes room"
    direct = open_cache(built(job(tmp_path / "direct", weights, encoder, 3, 4)))
    assert chained.manifest.parent == open_cache(first).manifest.fingerprint and direct.manifest.parent == ""
    a, b = (cache.read(range(30), view=1) for cache in (chained, direct))
    assert torch.equal(a.ids_BL, b.ids_BL) and torch.equal(a.pixels_BLP, b.pixels_BLP) and a.keys == b.keys
    difference = (a.features_BLD - b.features_BLD).norm() / b.features_BLD.norm()
    assert 0 < difference < 1e-3


@pytest.mark.parametrize(("parent_cut", "cut"), [(0, 3), (3, 6), (0, 6)])
def test_a_cache_of_a_cache_runs_only_the_blocks_between(tmp_path: Path, parent_cut: int, cut: int) -> None:
    """Of 8 blocks. Two views of 30 images in shards of 12, 12 and 6 rows and batches of at most 5: 16 batches, each of
    which runs a block once, over all of its groups. What compares 8 samples of each view with the images, where it
    continues a cache, runs all blocks once on these, and those between once more in 2 batches."""
    deep = replace(MODEL, depth=8)
    encoder, file = build_encoder(deep, seed=3), tmp_path / "model.safetensors"
    save_file(encoder.vit.state_dict(), file)

    def deep_job(cut: int, parent: Path | None) -> EncodeJob:
        continued = open_cache(parent).manifest.fingerprint if parent else ""
        spec = tiny_spec(IMAGES, DATA, frozen_hash(encoder.vit.state_dict(), cut), cut, depth=8, parent=continued)
        layout = Layout(spec, len(IMAGES), shard_rows=12)
        return encode_job(tmp_path / f"cut-{cut}", layout, deep, DATA, file, batch=5, parent=parent)

    one = deep_job(cut, built(deep_job(parent_cut, None)) if parent_cut else None)
    calls: Counter[int | str] = Counter()
    encoding = encode.frozen_encoder(one.weights, one.layout.spec.weights, cut, deep, "cpu")
    for index, block in enumerate(encoding.vit.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.update([index]))
    encoding.vit.patch_embed.register_forward_hook(lambda *_: calls.update(["embed"]))
    built(one)
    compared = Counter(dict.fromkeys(["embed", *range(cut)], 2) if parent_cut else {})
    compared += Counter(dict.fromkeys(range(parent_cut, cut), 4) if parent_cut else {})
    between = dict.fromkeys(range(parent_cut, cut), 16) | ({} if parent_cut else {"embed": 16})
    assert calls - compared == between and calls == compared + Counter(between)


def test_a_parent_is_opened_once_and_anew_where_it_was_built_anew(
    tmp_path: Path, weights: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest may have a million entries: reading it for every shard would take longer than the shard."""
    first = built(job(tmp_path / "one", weights, encoder, 1, 4))
    one = job(tmp_path / "two", weights, encoder, 3, 4, parent=first)
    create_store(Path(one.folder), one.layout, IMAGES.labels, IMAGES.keys, IMAGES.digests)
    plain, opened = backends.read_manifest, []

    def counted(folder: Path) -> CacheManifest:
        opened.append(Path(folder))
        return plain(folder)

    for module in (backends, reader):
        monkeypatch.setattr(module, "read_manifest", counted)
    for shard in one.layout.shards[:4]:
        encode_shard((one, shard, None))
    assert opened == [first]
    write_manifest(first, replace(plain(first), accumulated_error=0.01))
    for shard in one.layout.shards[4:]:
        encode_shard((one, shard, None))
    assert opened == [first, first]


def test_a_build_in_two_goes_is_byte_for_byte_that_in_one(tmp_path: Path, weights: Path, encoder: Encoder) -> None:
    straight = built(job(tmp_path / "straight", weights, encoder, 2, 4))
    one = job(tmp_path / "elsewhere" / "halves", weights, encoder, 2, 4)  # beside it, it would take all over
    ran: list[Shard] = []

    def counted(function: Callable[[object], Shard], tasks: Sequence[object]) -> Iterator[Shard]:
        for task in tasks:
            found = function(task)
            ran.extend([found] if function is encode_shard else [])  # shards that are there are hashed
            yield found

    half = build(one, IMAGES, counted)
    assert [next(half), next(half)] == [(1, 6), (2, 6)]
    half.close()
    with pytest.raises(CacheError):
        open_cache(one.folder)
    assert list(build(one, IMAGES, counted)) == [(3, 6), (4, 6), (5, 6), (6, 6)]
    assert len(ran) == len(set(ran)) == 6
    assert list(build(one, IMAGES, counted)) == []
    files = [path.relative_to(straight) for path in straight.rglob("*") if path.is_file()]
    assert len(files) > 24
    for file in files:
        assert (straight / file).read_bytes() == (Path(one.folder) / file).read_bytes(), file


def test_other_weights_in_the_file_are_refused(tmp_path: Path, encoder: Encoder) -> None:
    other = tmp_path / "other.safetensors"
    save_file(build_encoder(MODEL, seed=4).vit.state_dict(), other)
    with pytest.raises(StaleCache, match=r"weights=\w{8}… up to cut 2, the cache wants weights=\w{8}…"):
        encode_shard((job(tmp_path / "a", other, encoder, 2, 4), Shard(0, 0, 12), None))


def test_other_images_than_the_wanted_ones_are_refused(tmp_path: Path, weights: Path, encoder: Encoder) -> None:
    one = job(tmp_path / "a", weights, encoder, 2, 4)
    layout = replace(one.layout, spec=replace(one.layout.spec, data="0" * 64))
    with pytest.raises(StaleCache, match=r"sample holds data=\w{8}…, the cache wants data=00000000…"):
        encode_shard((replace(one, layout=layout), Shard(0, 0, 12), None))


def test_features_that_float16_cannot_hold_stop_the_build_by_name(tmp_path: Path, encoder: Encoder) -> None:
    state = {name: value.clone() for name, value in encoder.vit.state_dict().items()}
    state["blocks.0.mlp.fc2.bias"][7] = 1e5
    wild = tmp_path / "wild.safetensors"
    save_file(state, wild)
    one = job(tmp_path / "a", wild, encoder, 2, 4)
    spec = replace(one.layout.spec, weights=frozen_hash(state, 2))
    with pytest.raises(Unrepresentable, match=rf"{IMAGES.keys[0]}.* 65504"):
        list(build(replace(one, layout=replace(one.layout, spec=spec)), IMAGES, serial))


def test_a_shard_is_computed_while_the_one_before_is_written(
    tmp_path: Path, weights: Path, encoder: Encoder, monkeypatch
) -> None:
    from pipeline.cluster import task_runner
    from pipeline.config import ClusterConfig

    forward, write = encode.frozen_forward, encode.write_rows
    running, changed, forwards, writes = Lock(), Condition(), [], []

    def watched(*args):
        assert running.acquire(blocking=False), "one forward at a time"
        try:
            return forward(*args)
        finally:
            running.release()
            with changed:
                forwards.append(1)
                changed.notify_all()

    def late(*args):
        with changed:
            writes.append(1)
            before = 3 * len(writes)  # batches of the shards that are computed
            assert before == 18 or changed.wait_for(lambda: len(forwards) > before, 20), "the next is not computed"
        return write(*args)

    monkeypatch.setattr(encode, "frozen_forward", watched)
    monkeypatch.setattr(encode, "write_rows", late)
    one = job(tmp_path / "a", weights, encoder, 2, 4)
    with task_runner(ClusterConfig(), "cpu") as run:
        assert list(build(one, IMAGES, run))[-1] == (6, 6)


def test_two_shards_are_computed_at_once_where_the_job_says_so_to_the_same_bytes(
    tmp_path: Path, weights: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.cluster import task_runner
    from pipeline.config import ClusterConfig

    alone = built(job(tmp_path / "a" / "cache", weights, encoder, 2, 4))
    forward, both, threads = encode.frozen_forward, Barrier(2), set()

    def watched(*args):
        both.wait(20)  # every batch of the six shards meets one of another: none waits for a turn
        threads.add(torch.get_num_threads())
        return forward(*args)

    monkeypatch.setattr(encode, "frozen_forward", watched)
    together = replace(job(tmp_path / "b" / "cache", weights, encoder, 2, 4), threads=4, together=True)
    with task_runner(ClusterConfig(), "cpu") as run:
        assert list(build(together, IMAGES, run))[-1] == (6, 6)
    assert threads == {2}
    files = [path.relative_to(alone) for path in alone.rglob("*") if path.is_file()]
    assert all((alone / file).read_bytes() == (tmp_path / "b" / "cache" / file).read_bytes() for file in files)


def test_fewer_rows_than_asked_for_are_not_repeated(tmp_path: Path, weights: Path, encoder: Encoder) -> None:
    one = job(tmp_path / "cache", weights, encoder, 2, 4)
    load = encode.loader(one, 0)
    with pytest.raises(AssertionError, match="repeat what is too small"):
        encode_rows(one, 0, np.arange(5), lambda rows: load(rows[:1]))


@pytest.mark.parametrize("left", [None, 1])
def test_pixels_of_the_shard_before_never_stand_in_for_missing_ones(
    left: int | None, tmp_path: Path, weights: Path, encoder: Encoder
) -> None:
    """Shards of a thread share memory: what a part lacks there would be another image's."""
    one = job(tmp_path / "cache", weights, encoder, 2, 4)
    load, rows = encode.loader(one, 0), np.arange(4)
    first, second = (encode_rows(one, 0, rows + shift).pixels_NLP.copy() for shift in (0, 4))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(second, load(rows + 4).pixels_BLP)

    def lacking(rows: np.ndarray) -> Part:
        part = load(rows)
        return replace(part, pixels_BLP=part.pixels_BLP[:left] if left else None)

    with pytest.raises(AssertionError, match="old ones would stay"):
        encode_rows(one, 0, rows, lacking)


@pytest.mark.slow
def test_worker_processes_write_the_same_bytes_as_one_worker_inside(
    tmp_path: Path, weights: Path, encoder: Encoder
) -> None:
    from pipeline.cluster import task_runner
    from pipeline.config import ClusterConfig

    folders = []
    for workers in (0, 2):
        one = job(tmp_path / str(workers) / "cache", weights, encoder, 2, 4)
        with task_runner(ClusterConfig(workers=workers), "cpu") as run:
            assert [total for _, total in build(one, IMAGES, run)] == [6] * 6
        folders.append(Path(one.folder))
    files = [path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file()]
    assert all((folders[0] / file).read_bytes() == (folders[1] / file).read_bytes() for file in files)
