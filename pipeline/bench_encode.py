"""What loading, rounding and writing cost beside the frozen blocks as a cache is built: part of `permafrost bench`."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from cache.layout import Shard
from cache.writer import create_store, drop_receipts
from pipeline.building import encode_job, sweeping
from pipeline.desk import Desk
from pipeline.show import console, spread
from stages.device import autocast
from stages.encode import EncodeJob, Part, encode_shard, from_cache, from_images, frozen_encoder, frozen_forward


def bench_encode(desk: Desk) -> dict[str, list[float]]:
    """Seconds of encoding some shards, with loading and writing, and of the frozen blocks alone on the same inputs."""
    wanted = desk.wanted
    if len(wanted.segments) < 2:
        return {}
    with tempfile.TemporaryDirectory(dir=wanted.paths.root) as folder, sweeping(desk) as run:
        job = replace(encode_job(wanted, wanted.features(1)), folder=folder)
        data, shards = wanted.data.train, job.layout.shards[: wanted.config.bench.shards]
        create_store(Path(folder), job.layout, data.labels, data.keys, data.digests)
        parts = [part for shard in shards for part in loaded(job, shard)]
        encoder = frozen_encoder(job.weights, job.layout.spec.weights, job.layout.spec.cut, job.model, job.device)

        def alone() -> None:
            torch.set_num_threads(job.threads)
            with torch.inference_mode():
                for part in parts:
                    with autocast(job.device, job.layout.spec.dtype):
                        frozen_forward(encoder, job, part)

        def encode() -> None:
            drop_receipts(Path(folder))  # a shard that is there would be thrown away
            for _ in run(encode_shard, [(job, shard, None) for shard in shards]):
                pass

        ways = {"alone": alone, "encode": encode}
        found: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(wanted.config.bench.rounds + 1):
            for name in ways if number % 2 == 0 else reversed(ways):
                started = time.perf_counter()
                ways[name]()
                if number:  # the first round warms
                    found[name].append(time.perf_counter() - started)
    share = [alone / encode for alone, encode in zip(found["alone"], found["encode"], strict=True)]
    console().print(f"encoding {len(shards)} shards: throughput over the frozen blocks alone {spread(share)}")
    return found | {"throughput": share}


def loaded(job: EncodeJob, shard: Shard) -> list[Part]:
    """What the frozen blocks take of a shard, batch by batch."""
    load = from_cache(job, shard.view) if job.parent else from_images(job, job.layout.spec.view_at(shard.view))
    rows = np.arange(shard.first_row, shard.first_row + shard.rows)
    return [load(rows[start : start + job.batch]) for start in range(0, len(rows), job.batch)]
