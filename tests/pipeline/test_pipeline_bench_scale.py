"""The simulated cluster makes a whole cache, stopped half way, and says what it took."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cache.manifest import read_manifest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_simulated_cluster_builds_stops_and_finishes_a_real_cache(tmp_path: Path) -> None:
    """In a process of its own: it changes Dask's settings and the number of files that may be open."""
    sizes = ["--workers", "3", "--shards", "500", "--written", "420", "--manifest-shards", "50"]
    command = [sys.executable, "-m", "pipeline.bench_scale", *sizes, "--folder", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=600)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    manifest = read_manifest(tmp_path / "cache")
    assert {entry.first_row for entry in manifest.shards} == set(range(420))
    many = read_manifest(tmp_path / "many").shards
    assert len({entry.first_row for entry in many}) == 50 and found["manifest_files"] == len(many) > 3 * 50
    assert len(found["memory_by_tenth"]) >= 10 and all(found["overhead_seconds_per_shard"].values())
    assert all(len(growth) == 10 for growth in found["growth_per_shard_by_tenth"].values())
    assert set(found["memory_by_part"][0]) == {"client", "scheduler", "workers"}
    assert "500 tasks: " in done.stderr
