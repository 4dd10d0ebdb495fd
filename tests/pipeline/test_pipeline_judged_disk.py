"""The disk that a plan judges is that of the caches: not there yet, in a store, or full of the run's own caches."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from cache.size import cache_bytes
from pipeline import costs
from pipeline.config import PipelineConfig
from pipeline.decide import Wanted
from pipeline.layout import run_paths
from pipeline.scratch import disk_folder
from tests.pipeline.toy import job, toy

Usage = namedtuple("Usage", "total used free")


def planned(root: Path, config: PipelineConfig) -> Wanted:
    return Wanted(config, run_paths(str(root), config.cache.root))


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is a disk of its own, with 5 TB free; 1 TB elsewhere."""
    (large := tmp_path / "large").mkdir()

    def disk_usage(path: Path) -> Usage:
        return Usage(9, 9, 5_000_000_000_000 if large in (path, *Path(path).parents) else 1_000_000_000_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    return large


def test_a_disk_whose_folder_of_caches_is_not_there_yet(tmp_path: Path, large: Path) -> None:
    run = planned(tmp_path / "run", toy(**{"cache.root": str(large / "all" / "caches")}))
    plan = costs.make_plan(run)
    assert plan["profile"]["disk_gb"] == 5000 and plan["advice"]["budget_bytes"] == 5e12
    assert disk_folder(run) == large / "all" / "caches", "and its speed is measured"
    assert list(disk_folder(run).iterdir()) == []
    inside = planned(tmp_path / "other", toy())
    assert disk_folder(inside) == tmp_path / "other" and not (tmp_path / "other" / "cache").exists()


def test_a_store_has_no_end(tmp_path: Path, large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = planned(tmp_path / "run", toy(**{"cache.root": "memory://room/caches"}))
    plan = costs.make_plan(run, show=True)
    assert plan["profile"]["disk_gb"] == 1e9 and plan["advice"]["budget_bytes"] == 1e18, "JSON has no infinity"
    assert "caches that pay, in seconds: " in " ".join(capsys.readouterr().out.split())


def test_what_the_run_s_caches_have_is_theirs(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a disk that they have filled but for a little they fit as they are, and so does what is smaller."""
    free = 200_000
    monkeypatch.setattr(costs, "free_bytes", lambda folder: float(free))
    run = Wanted(toy(), job(copy).paths)
    size = sum(cache_bytes(run.layout(run.features(stage))) for stage in (1, 2))
    assert size > 4 * free and costs.room(run) == free + size
    plan = costs.make_plan(run, show=True)
    assert plan["disk_peak_bytes"] == size and plan["advice"]["budget_bytes"] == pytest.approx(free + size)
    rows = {row["why"]: row for row in plan["advice"]["settings"]}
    assert rows["fastest"]["bytes"] <= size + free and rows["smallest"]["bytes"] < size
    assert "the disk has" not in capsys.readouterr().out
    shutil.rmtree(run.cache_folder(run.spec(run.features(2))))
    assert costs.room(run) == free + cache_bytes(run.layout(run.features(1)))
