"""One peer of the cache benchmark, in an environment of its own: it imports numpy and the peer, nothing of Permafrost.
pipeline.bench_cache starts it with that environment's python and sends a command a line, `write` or `read <seed>`; the
answer is one line of JSON. Each peer is used as its documentation says for random access to arrays of one shape."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

Read = Callable[[np.ndarray], Any]
Peer = tuple[Callable[[], None], Callable[[int], Callable[[int], None]]]
"""Write everything; open for so many threads, which gives a function that reads an epoch shuffled by a seed."""


def mosaicml_streaming(values_NLD: np.ndarray, folder: Path, batch: int) -> Peer:
    """MDS, float16 arrays of a fixed shape, read by index."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    shape = ",".join(map(str, values_NLD.shape[1:]))

    def write() -> None:
        with MDSWriter(out=str(folder), columns={"x": f"ndarray:float16:{shape}"}) as out:
            for value in values_NLD:
                out.write({"x": value})

    def opened(threads: int) -> Callable[[int], None]:
        clean_stale_shared_memory()
        data = StreamingDataset(local=str(folder), batch_size=batch)
        assert np.array_equal(data[1]["x"], values_NLD[1])
        return by_rows([lambda rows: np.stack([data[int(row)]["x"] for row in rows])] * threads, len(data), batch)

    return write, opened


def litdata(values_NLD: np.ndarray, folder: Path, batch: int) -> Peer:
    """Chunks of 64 MB of flat float16 arrays without headers, read by index; a data set for each thread."""
    from litdata import StreamingDataset
    from litdata.streaming.cache import Cache

    def write() -> None:
        cache = Cache(str(folder), chunk_bytes="64MB")
        for number, value in enumerate(values_NLD):
            cache[number] = value.reshape(-1)
        cache.done()
        cache.merge()

    def reader() -> Read:
        data = StreamingDataset(str(folder))
        assert np.array_equal(data[1], values_NLD[1].reshape(-1))
        return lambda rows: np.stack([data[int(row)] for row in rows])

    def opened(threads: int) -> Callable[[int], None]:
        return by_rows([reader() for _ in range(threads)], len(values_NLD), batch)

    return write, opened


def tcache(values_NLD: np.ndarray, folder: Path, batch: int) -> Peer:
    """int8 in asymmetric blocks of 32, its default, given bfloat16; read in shuffled batches as bfloat16."""
    import torch
    from tensorcache import FeatureCacheDataset, FeatureCacheWriter

    given = torch.from_numpy(values_NLD).bfloat16()
    prefix = str(folder / "cache")

    def write() -> None:
        folder.mkdir(parents=True)
        with FeatureCacheWriter(prefix, *given.shape, group_size=32, amo_bq=True) as out:
            out.append(given)

    def opened(threads: int) -> Callable[[int], None]:
        torch.set_num_threads(threads)
        data = FeatureCacheDataset(prefix)
        first = next(iter(data.iter_batches(batch_size=1, shuffle=False, device="cpu")))
        assert (first[0].float() - given[0].float()).norm() < 0.02 * given[0].float().norm()

        def epoch(seed: int) -> None:
            np.random.seed(seed)  # the order is numpy's global one
            for _ in data.iter_batches(batch_size=batch, shuffle=True, device="cpu"):
                pass

        return epoch

    return write, opened


PEERS: dict[str, Callable[[np.ndarray, Path, int], Peer]] = {
    "mosaicml-streaming": mosaicml_streaming,
    "litdata": litdata,
    "tcache": tcache,
}


EPOCHS = 4
"""Epochs that every way reads in one go: a few hundred rows are only a few batches."""


def by_rows(readers: list[Read], count: int, batch: int) -> Callable[[int], None]:
    """Reads all rows in the order of a seed, batch by batch, by as many threads as there are readers."""
    free: SimpleQueue[Read] = SimpleQueue()
    for reader in readers:
        free.put(reader)

    def load(rows: np.ndarray) -> None:
        reader = free.get()
        try:
            reader(rows)
        finally:
            free.put(reader)

    def epoch(seed: int) -> None:
        with ThreadPoolExecutor(len(readers)) as pool:
            for _ in pool.map(load, batches(count, batch, seed)):
                pass

    return epoch


def batches(count: int, batch: int, seed: int) -> list[np.ndarray]:
    """All rows in random order, in batches; every row once."""
    order = np.random.default_rng(seed).permutation(count)
    return [order[start : start + batch] for start in range(0, count, batch)]


def answers(peer: Peer, folder: Path, threads: int, commands: Iterable[str]) -> Iterable[dict[str, Any]]:
    """Seconds of each command; of a read, seconds an epoch."""
    write, opened = peer
    epoch: Callable[[int], None] | None = None
    for command in commands:
        what, *seed = command.split()
        if what == "write":
            shutil.rmtree(folder, ignore_errors=True)
            epoch = None
        elif epoch is None:
            epoch = opened(threads)
        started = time.perf_counter()
        if what == "write":
            write()
        else:
            assert epoch is not None
            for number in range(EPOCHS):
                epoch(int(seed[0]) * EPOCHS + number)
        spent = time.perf_counter() - started
        yield {"seconds": spent if what == "write" else spent / EPOCHS}


def main() -> None:
    name, features, folder, threads, batch = sys.argv[1:]
    out, sys.stdout = sys.stdout, sys.stderr  # peers print
    try:
        peer = PEERS[name](np.load(features), Path(folder), int(batch))
        for answer in answers(peer, Path(folder), int(threads), sys.stdin):
            print(json.dumps(answer), file=out, flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)


if __name__ == "__main__":
    main()
