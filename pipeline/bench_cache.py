"""The cache beside others, part of `permafrost bench`: shards written and rows of shuffled epochs read, warm, of the
same features by the same number of threads. What is quoted is medians of ratios within a round. Streaming, LitData and
tcache run in an environment of their own (pipeline.bench_others); without it they are left out, and that is said."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cache import open_cache
from cache.buffers import Buffers
from cache.layout import Layout
from cache.loader import Prefetch
from cache.manifest import as_bytes, read_manifest
from cache.shard import encode_shard
from cache.writer import RowBlock, create_store, finish, write_rows
from models.spec import FeatureSpec
from pipeline import peers
from pipeline.bench_memory import memory_curve
from pipeline.bench_others import foreign, others
from pipeline.bench_ways import GROUPS, SHAPE, Rounds, Setting, Way, timed
from pipeline.config import BenchConfig
from pipeline.show import console, spread, table


def bench_cache(config: BenchConfig, root: Path) -> dict[str, Any]:
    """Measures, prints and returns every way's rates, in a folder under `root` that goes afterwards."""
    random = np.random.default_rng(0)
    given_NLD = random.standard_normal((config.rows, *SHAPE), np.float32)
    before = torch.get_num_threads()
    with tempfile.TemporaryDirectory(dir=root) as folder, ExitStack() as stack:
        torch.set_num_threads(config.threads)
        setting = Setting(given_NLD, Path(folder), config)
        found = ours(setting) | others(setting)
        found |= foreign(setting, stack)
        rounds = run_rounds(found, config.rounds)
        show(found, rounds, config)
        errors = {name: read_manifest(Path(folder) / name).errors[0].relative_rmse for name in CODECS}
        curve = memory_curve(Path(folder) / "permafrost float16")
    torch.set_num_threads(before)
    return {"ways": summary(found, rounds, config), "errors": errors, "memory": curve, "threads": config.threads}


def run_rounds(ways: dict[str, Way], rounds: int) -> dict[str, Rounds]:
    """Every way once a round, forwards and backwards in turn, after a round that only warms."""
    found = {name: Rounds([], []) for name in ways}
    for number in range(rounds + 1):
        for name in ways if number % 2 == 0 else reversed(ways):
            wrote, read = ways[name].write(), ways[name].read
            spent = [read(2 * number + epoch) for epoch in range(2)] if read else []
            if number:
                found[name].write.append(wrote)
                found[name].read.extend(spent[1:])  # the first opens the files
    return found


def summary(ways: dict[str, Way], rounds: dict[str, Rounds], config: BenchConfig) -> dict[str, Any]:
    """Rates and ratios by way, a number a round. A ratio is Permafrost's float16 zarr over the way: above 1, faster."""
    base, found = rounds[BASE], {}
    values = config.rows * SHAPE[0] * SHAPE[1]
    for name, way in ways.items():
        seconds = rounds[name]
        found[name] = {
            "stored": way.stored,
            "out": way.out,
            "checksums": way.checksums,
            "note": way.note,
            "read_samples_per_second": [config.rows / s for s in seconds.read],
            "read_gb_per_second": [values * way.share * way.value_bytes / s / 1e9 for s in seconds.read],
            "write_samples_per_second": [config.rows / s for s in seconds.write],
            "read_ratio": [theirs / mine for mine, theirs in zip(base.read, seconds.read, strict=bool(seconds.read))],
            "write_ratio": [theirs / mine for mine, theirs in zip(base.write, seconds.write, strict=True)],
        }
    return found


def show(ways: dict[str, Way], rounds: dict[str, Rounds], config: BenchConfig) -> None:
    """The table; the last two columns are how many times as fast as the way Permafrost's float16 zarr is."""
    heads = ("cache", "stored", "read as", "checksums", "read samples/s", "GB/s out", "write samples/s")
    rows = table(*heads, "read: ours over it", "write: ours over it")
    for name, found in summary(ways, rounds, config).items():
        rows.add_row(
            *(name, found["stored"], found["out"], "yes" if found["checksums"] else "no"),
            *(middle(found["read_samples_per_second"], 0), middle(found["read_gb_per_second"], 2)),
            middle(found["write_samples_per_second"], 0),
            *(spread(found[ratio]) if found[ratio] else "-" for ratio in ("read_ratio", "write_ratio")),
        )
    console().print(f"{config.rows} rows of {SHAPE}, {config.threads} threads, batches of {config.batch}, warm")
    console().print(rows)


def middle(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f}" if values else "-"


BASE = "permafrost float16"
CODECS = {
    BASE: ("float16", "zarr"),
    "permafrost bfloat16": ("bfloat16", "zarr"),
    "permafrost int8": ("int8", "zarr"),
    "permafrost float16 webdataset": ("float16", "webdataset"),
}


def ours(setting: Setting) -> dict[str, Way]:
    """Permafrost's codecs and backends, given float32, read as float32; and one token group alone."""
    found = {}
    for name, (codec, backend) in CODECS.items():
        read = read_of(setting, name)
        found[name] = Way(write_of(setting, name, codec, backend), read, f"{codec} {backend}", "float32", True, 4)
    one = read_of(setting, BASE, group=1)
    stored = replace(found[BASE], read=read_stored(setting, BASE), out="float16", value_bytes=2)
    found["permafrost float16, as stored"] = stored
    plain = "given float16, one thread, nothing measured or hashed, not made durable, as zarr-python"
    found["permafrost float16, shards alone"] = replace(
        found[BASE], write=lambda: write_shards(setting), read=None, note=plain
    )
    found["permafrost float16, one group of 4"] = replace(found[BASE], read=one, share=1 / GROUPS)
    return found


def write_of(setting: Setting, name: str, codec: str, backend: str) -> Callable[[], float]:
    """Writes a whole cache: metadata, shards, manifest; durably, errors and statistics measured."""
    rows = len(setting.given_NLD)
    layout = Layout(bench_spec(codec), rows, min(setting.config.shard_rows, rows), backend)
    keys = tuple(f"{row:08d}" for row in range(rows))
    ids_NL = np.tile(np.arange(SHAPE[0]), (rows, 1))

    def write() -> None:
        folder = setting.folder / name
        create_store(folder, layout, np.zeros(rows, np.int64), keys, np.zeros((rows, 32), np.uint8))
        for shard in layout.shards:
            own = slice(shard.first_row, shard.first_row + shard.rows)
            crop = np.zeros((shard.rows, 5), np.float32)
            write_rows(folder, layout, 0, own.start, RowBlock(setting.given_NLD[own], crop, keys[own], ids_NL[own]))
        finish(folder, layout)

    def cleared() -> float:
        shutil.rmtree(setting.folder / name, ignore_errors=True)
        return timed(write)

    return cleared


def write_shards(setting: Setting) -> float:
    """Seconds of what zarr-python's sharded write does: rounded values to shards with a crc32c of every chunk."""
    folder, rows = setting.folder / "shards alone", setting.config.shard_rows
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def write() -> None:
        for first in range(0, len(setting.half_NLD), rows):
            chunks = setting.half_NLD[first : first + rows].reshape(-1, SHAPE[0] // GROUPS * SHAPE[1])
            with (folder / str(first)).open("wb") as file:
                file.writelines(encode_shard(map(as_bytes, chunks), rows * GROUPS))

    return timed(write)


def read_of(setting: Setting, name: str, group: int | None = None) -> Callable[[int], float]:
    def read(seed: int) -> float:
        reader = open_cache(setting.folder / name)
        batches = peers.batches(len(reader), setting.config.batch, seed)

        def made(rows: np.ndarray, into: Buffers) -> Any:
            return reader.read(rows, 0, group, into=into)

        threads = setting.config.threads
        with Prefetch(made, batches * (peers.EPOCHS + 1), threads, 2 * threads) as loaded:
            for _ in batches:  # the loader's memory is touched for the first time, once a training, not once an epoch
                next(loaded)
            return timed(lambda: [None for _ in loaded]) / peers.EPOCHS

    return read


def read_stored(setting: Setting, name: str) -> Callable[[int], float]:
    """Reads rows as they are stored, as np.memmap gives them, into memory that each thread uses again."""

    def read(seed: int) -> float:
        reader = open_cache(setting.folder / name)

        def own() -> peers.Read:
            out = np.empty((setting.config.batch, *SHAPE), np.float16)
            return lambda rows: reader.stored("features", rows, out=out[: len(rows)])

        return setting.epoch(own, seed)

    return read


def bench_spec(codec: str) -> FeatureSpec:
    """A view of a ViT-B cache in four token groups; nothing of it but its shapes has a say."""
    return FeatureSpec(
        model="bench", image_size=224, patch_size=16, width=SHAPE[1], depth=12, heads=12, weights="0" * 64, cut=3,
        groups=GROUPS, mask_ratio=0.75, mask_block=1, views=1, view_transform="none", data="0" * 64, seed=0,
        dtype="float32", codec=codec, block=32 if codec == "int8" else 0, pixels=False, parent="", version=1,
    )
