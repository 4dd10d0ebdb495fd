"""The memory that an epoch over a cache takes, measured on a process of its own: part of the cache's benchmark, and of
the tests that hold its bound."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.show import console

EPOCH = """
import json, sys, psutil
from cache import open_cache
from cache.loader import Prefetch
from cache.order import batch_rows

folder, limit, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
memory = lambda: psutil.Process().memory_info().rss
reader = open_cache(folder, memory=limit // 2)
load = lambda step, into: reader.read(batch_rows(0, 0, step, len(reader), batch), 0, into=into).features_BLD
with Prefetch(lambda row, into: reader.read([row]), range(4), threads=2, ahead=2) as warm:
    list(warm)  # code is loaded at its first use; what is bounded is data
curve, total = [memory()], 0.0
with Prefetch(load, range(len(reader) // batch), threads=2, ahead=4, memory=limit // 2) as batches:
    for features in batches:
        total += float(features.numpy()[:, 0, 0].sum())
        curve.append(memory())
print(json.dumps({"curve": curve, "total": total, "mapped": folder in open("/proc/self/maps").read()}))
"""


class EpochFailed(RuntimeError):
    """The epoch did not run; why."""


@dataclass(frozen=True)
class EpochMemory:
    """What the process of an epoch has held."""

    curve: list[int]
    """Bytes beyond those before the first batch, at every batch."""
    total: float
    """Of every sample's first value: what was read."""
    mapped: bool
    """Whether files of the cache were mapped at the end."""


def epoch_memory(folder: Path, limit: int, batch: int) -> EpochMemory:
    """Memory of an epoch over a cache's first view, read within `limit` bytes. EpochFailed."""
    command = [sys.executable, "-c", EPOCH, str(folder), str(limit), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EpochFailed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    found = json.loads(done.stdout)
    curve = [point - found["curve"][0] for point in found["curve"][1:]]
    return EpochMemory(curve, found["total"], found["mapped"])


def memory_curve(folder: Path) -> dict[str, Any]:
    """Bytes that the process of an epoch over a cache of ten times its limit takes, beyond those before it."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    limit = size // 10
    try:
        curve = epoch_memory(folder, limit, batch=2).curve
    except EpochFailed as error:
        console().print(f"an epoch over {size / 1e6:.0f} MB within {limit / 1e6:.0f} MB does not run: {error}")
        return {"cache_bytes": size, "limit_bytes": limit, "failed": str(error)}
    console().print(f"an epoch over {size / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB, takes {max(curve) / 1e6:.1f} MB")
    return {"cache_bytes": size, "limit_bytes": limit, "curve": curve}
