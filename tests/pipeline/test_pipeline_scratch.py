"""Where a plan measures: in folders of its own on the disk of the caches, whoever plans beside it or was killed."""

from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import gauge
from pipeline.decide import Wanted
from pipeline.layout import RunPaths
from pipeline.scratch import LEFT_SECONDS, scratch
from tests.pipeline.toy import toy


def seeded(root: Path, seed: int) -> Wanted:
    return Wanted(toy(seed=seed), RunPaths(root))


def test_two_plans_measure_in_one_folder_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has written its cache of noise before either finishes it, and removes its own."""
    both, finish = threading.Barrier(2, timeout=60), gauge.finish

    def finish_together(*args: object) -> None:
        both.wait()
        finish(*args)
        both.wait()

    monkeypatch.setattr(gauge, "finish", finish_together)
    with ThreadPoolExecutor(2) as pool:
        plans = [pool.submit(gauge.measure_storing, seeded(tmp_path, seed), tmp_path) for seed in (0, 1)]
        for plan in plans:
            codecs, write_rate, read_rate = plan.result()
            assert len(codecs) == 3 and write_rate > 0 and read_rate > 0
    assert not list(tmp_path.glob(".plan*"))


def test_what_a_killed_plan_has_left_does_no_harm_and_goes_when_it_is_old(tmp_path: Path) -> None:
    """`.plan` is what earlier versions left."""
    now = time.time()
    for name, age in ((".plan", 2 * LEFT_SECONDS), (".plan-old", 2 * LEFT_SECONDS), (".plan-now", LEFT_SECONDS / 2)):
        (tmp_path / name / "cache").mkdir(parents=True)
        (tmp_path / name / "cache" / "manifest.json").write_text("{}")
        os.utime(tmp_path / name, (now - age, now - age))
    (tmp_path / "cut-1-00000000").mkdir()
    os.utime(tmp_path / "cut-1-00000000", (0, 0))
    with scratch(tmp_path) as folder:
        assert folder.is_dir() and folder.parent == tmp_path
        assert {path.name for path in tmp_path.iterdir()} == {".plan-now", folder.name, "cut-1-00000000"}
    assert not folder.exists()
    _, write_rate, _ = gauge.measure_storing(seeded(tmp_path, 3), tmp_path)
    assert write_rate > 0 and (tmp_path / ".plan-now" / "cache" / "manifest.json").read_text() == "{}"
