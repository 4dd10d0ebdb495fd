"""The cache beside others, part of `permafrost bench`: shards written and rows of shuffled epochs read, warm, of the
same features by the same number of threads. What is quoted is medians of ratios within a round. Streaming, LitData and
tcache run in an environment of their own (pipeline.peers); without it they are left out, and that is said."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
import zarr
from zarr.codecs import Crc32cCodec

from cache import open_cache
from cache.buffers import Buffers
from cache.layout import Layout
from cache.loader import Prefetch
from cache.manifest import read_manifest
from cache.writer import RowBlock, create_store, finish, write_rows
from models.spec import FeatureSpec
from pipeline import peers
from pipeline.bench_memory import memory_curve
from pipeline.config import BenchConfig
from pipeline.show import console, spread, table

PEERS_PYTHON = Path(".venv-peers/bin/python")
"""Made by `make bench`."""
SHAPE = 196, 768
GROUPS = 4


@dataclass(frozen=True)
class Way:
    """One way to keep features: what a round times, and what it is."""

    write: Callable[[], float]
    """Seconds of writing all rows."""
    read: Callable[[int], float] | None
    """Seconds of reading all rows in the order of a seed; None where another way reads the same files."""
    stored: str
    out: str
    checksums: bool
    value_bytes: int
    """Of a value that a reader gets."""
    share: float = 1.0
    """Of a row's values that are read."""
    note: str = ""


class Rounds(NamedTuple):
    """Seconds of a way, one a round."""

    write: list[float]
    read: list[float]


@dataclass(frozen=True)
class Setting:
    """What all ways keep, and how they are read."""

    given_NLD: np.ndarray
    """float32"""
    folder: Path
    config: BenchConfig
    half_NLD: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "half_NLD", torch.from_numpy(self.given_NLD).half().numpy())

    def epoch(self, read: Callable[[], peers.Read], seed: int) -> float:
        """Seconds of an epoch by batches, on the threads of the benchmark, each with a `read` of its own, after one
        that maps files and memory."""
        readers = [read() for _ in range(self.config.threads)]
        epoch = peers.by_rows(readers, len(self.given_NLD), self.config.batch)
        epoch(seed)
        return epochs(epoch, seed)


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


def others(setting: Setting) -> dict[str, Way]:
    """What can run beside it, given float16."""
    given_NLD, half, flat = setting.given_NLD, setting.half_NLD, setting.folder / "memmap.npy"

    def write_memmap() -> float:
        return timed(lambda: np.save(flat, half))

    def read_memmap(seed: int) -> float:
        array = np.load(flat, mmap_mode="r")
        return setting.epoch(lambda: lambda picked: array[picked], seed)

    limits = {"async.concurrency": setting.config.threads, "threading.max_workers": setting.config.threads}
    zarr.config.set(limits)

    def read_zarr(seed: int) -> float:
        array = zarr.open_array(setting.folder / "zarr", mode="r")
        return setting.epoch(lambda: lambda picked: array.oindex[picked], seed)

    def zarr_way(given: Callable[[], np.ndarray], read: Callable[[int], float] | None, note: str) -> Way:
        return Way(lambda: write_zarr(setting, given), read, "float16", "float16", True, 2, note=note)

    tar, hasty = setting.folder / "wds.tar", "not made durable"
    sequential = "shuffled in memory, by one thread, in sequence; not made durable"
    return {
        "np.memmap": Way(write_memmap, read_memmap, "float16", "float16", False, 2, note=hasty),
        "zarr-python": zarr_way(lambda: half, read_zarr, f"given float16; {hasty}"),
        "zarr-python from float32": zarr_way(lambda: given_NLD.astype(np.float16), None, f"rounded by numpy; {hasty}"),
        "webdataset": Way(
            lambda: timed(lambda: write_tar(tar, half)),
            lambda seed: read_tar(setting, tar, seed),
            *("float16", "float16", False, 2),
            note=sequential,
        ),
    }


def write_zarr(setting: Setting, given: Callable[[], np.ndarray]) -> float:
    """Seconds of a sharded write, a token group to an inner chunk, each with its crc32c."""
    store = setting.folder / "zarr"
    shutil.rmtree(store, ignore_errors=True)

    def write() -> None:
        values = given()
        array = zarr.create_array(
            store,
            shape=values.shape,
            dtype="float16",
            shards=(min(setting.config.shard_rows, len(values)), *SHAPE),
            chunks=(1, SHAPE[0] // GROUPS, SHAPE[1]),
            compressors=[Crc32cCodec()],
        )
        array[:] = values

    return timed(write)


def write_tar(tar: Path, values: np.ndarray) -> None:
    with webdataset.TarWriter(str(tar)) as out:
        for row, value in enumerate(values):
            out.write({"__key__": f"{row:08d}", "x.npy": value})


def read_tar(setting: Setting, tar: Path, seed: int) -> float:
    data = webdataset.WebDataset(str(tar), shardshuffle=False, empty_check=False)
    data = data.shuffle(len(setting.half_NLD), seed=seed).decode().batched(setting.config.batch, collation_fn=list)

    def epoch(seed: int) -> None:
        for batch in data:
            np.stack([sample["x.npy"] for sample in batch])

    return epochs(epoch, seed)


def foreign(setting: Setting, stack: ExitStack) -> dict[str, Way]:
    """The peers in their own environment; those that do not run are named and left out."""
    if not PEERS_PYTHON.exists():
        console().print(f"without Streaming, LitData and tcache: there is no {PEERS_PYTHON}; `make bench` makes it")
        return {}
    features = setting.folder / "features.npy"
    np.save(features, setting.half_NLD)
    found = {}
    for name in peers.PEERS:
        ask = stack.enter_context(peer(name, features, setting, PEERS_PYTHON))
        try:
            first = ask("write")
            ask("read 0")
        except PeerFailed as error:
            console().print(f"without {name}: {error}")
            continue
        stored, out, width = ("int8", "bfloat16", 2) if name == "tcache" else ("float16", "float16", 2)

        def read(seed: int, ask: Callable[[str], float] = ask) -> float:
            return ask(f"read {seed}")

        def write(ask: Callable[[str], float] = ask, first: float = first) -> float:
            return first if first > SLOW_SECONDS else ask("write")

        note = "written once, " if first > SLOW_SECONDS else ""
        found[name] = Way(write, read, stored, out, False, width, note=note + "not made durable")
    return found


SLOW_SECONDS = 5.0
"""What takes longer to write is written once."""


class PeerFailed(RuntimeError):
    """A peer does not run; why."""


@contextmanager
def peer(name: str, features: Path, setting: Setting, python: Path) -> Iterator[Callable[[str], float]]:
    """A running peer: a function that sends a command and gives its seconds. PeerFailed."""
    words = [name, features, setting.folder / name, setting.config.threads, setting.config.batch]
    command = [str(python), peers.__file__, *map(str, words)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        send, answer = process.stdin, process.stdout

        def ask(what: str) -> float:
            try:
                send.write(what + "\n")
                send.flush()
            except BrokenPipeError:
                raise PeerFailed("it has ended") from None
            return parsed(answer.readline())

        try:
            yield ask
        finally:
            process.kill()


def parsed(line: str) -> float:
    """Seconds of a peer's answer. PeerFailed."""
    try:
        found = json.loads(line)
    except ValueError:
        raise PeerFailed("it has ended without an answer") from None
    if "error" in found:
        raise PeerFailed(found["error"])
    return float(found["seconds"])


def epochs(epoch: Callable[[int], None], seed: int) -> float:
    """Seconds of one epoch, of several in turn."""
    started = time.perf_counter()
    for number in range(peers.EPOCHS):
        epoch(seed * peers.EPOCHS + number)
    return (time.perf_counter() - started) / peers.EPOCHS


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
