"""The memory that an epoch takes, measured on a process of its own: part of the cache's benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.show import console

EPOCH = """
import json, sys, psutil
from cache import open_cache
from cache.loader import Prefetch
from cache.order import batch_rows
folder, limit, batch = sys.argv[1], int(sys.argv[2]), 2
reader = open_cache(folder, memory=limit // 2)
load = lambda step, into: reader.read(batch_rows(0, 0, step, len(reader), batch), 0, into=into)
curve = []
with Prefetch(lambda row, into: reader.read([row], into=into), range(4), threads=2, ahead=2) as warm:
    list(warm)
with Prefetch(load, range(len(reader) // batch), threads=2, ahead=4, memory=limit // 2) as loaded:
    for _ in loaded:
        curve.append(psutil.Process().memory_info().rss)
print(json.dumps(curve))
"""


def memory_curve(folder: Path) -> dict[str, Any]:
    """Bytes that the process of an epoch over a cache of ten times its limit takes, beyond those at the first batch."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    limit = size // 10
    done = subprocess.run(
        [sys.executable, "-c", EPOCH, str(folder), str(limit)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1]
        console().print(f"an epoch over {size / 1e6:.0f} MB within {limit / 1e6:.0f} MB does not run: {why}")
        return {"cache_bytes": size, "limit_bytes": limit, "failed": why}
    curve = json.loads(done.stdout)
    most = max(curve) - curve[0]
    console().print(f"an epoch over {size / 1e6:.0f} MB, limit {limit / 1e6:.0f} MB, takes {most / 1e6:.1f} MB")
    return {"cache_bytes": size, "limit_bytes": limit, "curve": [point - curve[0] for point in curve]}
