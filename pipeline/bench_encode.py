"""What writing, and loading, cost beside the frozen blocks as a cache is built: part of `permafrost bench`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cache.layout import Shard
from cache.writer import create_store, drop_receipts
from pipeline.building import encode_job
from pipeline.desk import Desk
from pipeline.show import console, spread
from stages.device import autocast
from stages.encode import EncodeJob, Load, Part, encode_shard, frozen_encoder, frozen_forward, loader

THREADS = 2
"""Of a worker: one runs the frozen blocks while the other writes what they gave before, or runs them too."""


def bench_encode(desk: Desk) -> dict[str, list[float]]:
    """Seconds of encoding some shards of stage 1's cache: the frozen blocks alone on inputs in memory, a batch at a
    time on all threads and, on a CPU, two at once; with writing; and with loading (images decoded and cut, or
    the parent read) as well."""
    wanted = desk.wanted
    if len(wanted.segments) < 2:
        return {}
    with tempfile.TemporaryDirectory(dir=wanted.paths.root) as folder:
        job = replace(encode_job(wanted, wanted.features(1)), folder=folder)
        data, shards = wanted.data.train, [shard for shard in job.layout.shards if not shard.view]
        shards = shards[: wanted.config.bench.shards]
        create_store(Path(folder), job.layout, data.labels, data.keys, data.digests)
        found = timed_rounds(encode_ways(job, shards), wanted.config.bench.rounds)
    out = console()
    for name, what in (("written", "with writing"), ("loaded", "with loading and writing")):
        for alone in [way for way in found if way.startswith("alone")]:
            share = [by_itself / encode for by_itself, encode in zip(found[alone], found[name], strict=True)]
            found[f"throughput {name} over {alone}"] = share
            told = f"throughput over the frozen blocks {alone}"
            out.print(f"encoding {len(shards)} shards {what}: {told} {spread(share)}")
    return found


def encode_ways(job: EncodeJob, shards: Sequence[Shard]) -> dict[str, Callable[[], None]]:
    """What a round times."""
    parts = {rows[0]: part for shard in shards for rows, part in loaded(job, shard)}
    encoder = frozen_encoder(job.weights, job.layout.spec.weights, job.layout.spec.cut, job.model, job.device)

    def forward(part: Part, threads: int) -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode(), autocast(job.device, job.layout.spec.dtype):
            frozen_forward(encoder, job, part)

    def alone() -> None:
        for part in parts.values():
            forward(part, job.threads)

    def two_at_once() -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(partial(forward, threads=job.task_threads), parts.values()))

    def encode(load: Load | None) -> None:
        drop_receipts(Path(job.folder))  # a shard that is there would be thrown away
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(partial(encode_shard, load=load), [(job, shard, None) for shard in shards]))

    return {
        "alone": alone,
        **({"alone, two at once": two_at_once} if job.together else {}),
        "written": lambda: encode(lambda rows: parts[rows[0]]),
        "loaded": lambda: encode(None),
    }


def timed_rounds(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way, a number a round, forwards and backwards in turn; a round before them warms."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name in ways if number % 2 == 0 else reversed(ways):
            started = time.perf_counter()
            ways[name]()
            if number:
                found[name].append(time.perf_counter() - started)
    return found


def loaded(job: EncodeJob, shard: Shard) -> list[tuple[np.ndarray, Part]]:
    """Rows and what the frozen blocks take of them, batch by batch, of a view's shard."""
    load, rows = loader(job, shard.view), np.arange(shard.first_row, shard.first_row + shard.rows)
    batches = [rows[start : start + job.batch] for start in range(0, len(rows), job.batch)]
    return [(batch, load(batch)) for batch in batches]
