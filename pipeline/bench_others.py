"""The ways of others in the cache benchmark: those that run in this process, and those that need an environment of
their own (pipeline.peers)."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import webdataset
import zarr
from zarr.codecs import Crc32cCodec

from pipeline import peers
from pipeline.bench_ways import GROUPS, SHAPE, Setting, Way, epochs, timed
from pipeline.show import console

PEERS_PYTHON = Path(".venv-peers/bin/python")
"""Made by `make bench`."""

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
    # -P: this folder's modules, profile.py among them, must not stand before the standard library's
    command = [str(python), "-P", peers.__file__, *map(str, words)]
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
