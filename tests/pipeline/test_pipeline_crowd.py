"""Seconds that were taken beside other work are not believed: in the comparison, report and tables of studies."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from cache.users import Cost, read_cost, write_cost
from cache.verify import remove_cache
from pipeline import building, machine, runner, speedup
from pipeline.building import crowd_of
from pipeline.comparable import crowded
from pipeline.decide import Wanted
from pipeline.layout import RunPaths
from pipeline.machine import whole_machine
from pipeline.outcome import Row, lines, table_md
from pipeline.report import warnings
from pipeline.seconds import keep_cost, read_seconds, spent_on
from pipeline.story import read_story
from pipeline.studies import Study, row
from tests.pipeline.toy import job, record, sharing, toy

pytestmark = pytest.mark.usefixtures("crowds")


def test_from_a_twentieth_on_seconds_are_called_too_long() -> None:
    quiet = {"total_seconds": 100.0, "crowded_seconds": 4.9}
    unknown = {"total_seconds": 100.0, "crowded_seconds": None}
    assert crowded({"e2e": quiet, "freeze": unknown, "cached": {"total_seconds": 0.0}}) == ""
    told = crowded({"e2e": quiet, "cached": {"total_seconds": 50.0, "crowded_seconds": 20.0}})
    assert told.startswith("other work had the cores for 40 % of the seconds of cached, so they are too long")


def test_the_comparison_and_the_report_tell(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads((copy / "speedup.json").read_text())
    for name, share in (("e2e", 0.0), ("freeze", 0.01), ("cached", 0.25)):
        arm = found["arms"][name]
        lost = arm["crowded_seconds"]
        assert lost is None if not whole_machine() else 0.0 <= lost <= arm["total_seconds"], "measured"
        arm |= {"crowded_seconds": share * arm["total_seconds"], "watched_seconds": arm["total_seconds"]}
    (copy / "speedup.json").write_text(json.dumps(found))
    told = " ".join(warnings(read_story(RunPaths(copy))))
    assert "Other work had the cores for 25 % of the seconds of cached, so they are too long" in told
    assert "of the seconds of freeze" not in told
    speedup.show(found)
    assert "other work had the cores for 25 % of the seconds of cached" in " ".join(capsys.readouterr().out.split())


def test_of_a_part_of_a_machine_nobody_can_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: 64)
    assert not whole_machine()
    runner.run_stage(job(tmp_path / "toy", target=0))
    assert record(tmp_path / "toy", "stage-0")["crowded_seconds"] is None
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: 2)
    assert whole_machine()


def test_the_table_of_a_study_tells() -> None:
    asked = Study("q", {"e2e": row("e2e"), "near": row()}, "e2e")
    plain = {"knn_top1": 0.5, "total_seconds": 9.0, "train_seconds": 8.0, "probe_images": 40}
    busy = plain | {"crowded_seconds": 2.25, "watched_seconds": 9.0}
    rows = [Row("e2e", 0, "done", plain), Row("near", 0, "done", busy)]
    told = table_md(asked, "q", [], lines(asked, rows), rows)
    assert "Other work had the cores for 25 % of the seconds of near, seed 0, so they are too long" in told


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_other_work_took_of_a_cache_counts(share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for who finds the cache; of workers in other processes nobody can tell."""
    cores = psutil.cpu_count()
    monkeypatch.setattr(building, "whole_machine", lambda: True)
    monkeypatch.setattr(building, "others", lambda: time.perf_counter() * (cores - 1 + share))
    first, second = tmp_path / "first", tmp_path / "second"
    runner.run_stage(sharing(first, tmp_path / "store", toy(**{"train.threads": 1}), target=1))
    found = record(first, "stage-1")
    assert found["cache_crowded_seconds"] == pytest.approx(share * found["cache_seconds"], rel=0.05, abs=0.01)
    assert record(first, "stage-0")["cache_crowded_seconds"] is None
    runner.run_stage(sharing(second, tmp_path / "store", toy(**{"train.threads": 1}), target=1))
    assert record(second, "stage-1")["cache_crowded_seconds"] == found["cache_crowded_seconds"]
    plain, elsewhere = toy(), toy(**{"cluster.workers": 2})
    assert crowd_of(plain, 1) and crowd_of(elsewhere, 1) is None


def test_what_a_cache_has_cost_outlives_it_beside_what_read_it(copy: Path) -> None:
    """A ring of views removes caches as it turns, and their own notes with them."""
    wanted = Wanted(toy(), RunPaths(copy))
    paths, spec = wanted.paths.stage(1), wanted.cache_spec(1)
    folder, own = wanted.cache_folder(spec), read_seconds(paths, spec.fingerprint)
    write_cost(folder, Cost(100.0, 40.0))
    keep_cost(wanted, paths, spec)
    remove_cache(folder)
    assert read_cost(folder) is None
    found = spent_on(wanted, paths, spec)
    assert (found.own, found.elsewhere, found.crowded) == (own, pytest.approx(100.0 - own), 40.0)
