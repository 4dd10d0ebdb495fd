"""Memory that reading takes stays within its setting, measured on a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cache.conftest import make_example

EPOCH = """
import json, sys, psutil
from cache import open_cache
from cache.loader import Prefetch
from cache.order import batch_rows

folder, limit = sys.argv[1], int(sys.argv[2])
memory = lambda: psutil.Process().memory_full_info().rss
reader = open_cache(folder, memory=limit // 2)
load = lambda step, into: reader.read(batch_rows(0, 0, step, len(reader), 4), 0, into=into).features_BLD
with Prefetch(lambda row, into: reader.read([row]), range(4), threads=2, ahead=2) as warm:
    list(warm)  # code is loaded at its first use; what is bounded is data
curve, total = [memory()], 0.0
with Prefetch(load, range(len(reader) // 4), threads=2, ahead=4, memory=limit // 2) as batches:
    for features in batches:
        total += float(features.numpy()[:, 0, 0].sum())
        curve.append(memory())
print(json.dumps({"curve": curve, "total": total}))
"""


@pytest.mark.slow
def test_an_epoch_over_a_cache_of_ten_times_the_limit_keeps_within_it(tmp_path: Path) -> None:
    wanted = make_example(512, 64, image_size=112, patch_size=8, width=768, groups=1, views=1, pixels=False)
    wanted.build(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    limit = 15_000_000
    assert size >= 10 * limit
    done = subprocess.run([sys.executable, "-c", EPOCH, str(tmp_path), str(limit)], capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert found["total"] == pytest.approx(wanted.stored_VNLD[0, :, 0, 0].astype(float).sum(), abs=1e-3)
    assert max(found["curve"]) - found["curve"][0] <= limit, [point - found["curve"][0] for point in found["curve"]]
