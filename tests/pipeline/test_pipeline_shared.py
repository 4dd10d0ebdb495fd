"""Caches that runs share: found, not built again, accounted for, and never taken from a run that needs them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache.errors import CacheError
from cache.lock import hold_cache
from cache.manifest import atomic_write, read_manifest, seal
from cache.users import Cost, read_cost, write_cost
from cache.verify import verify_cache
from pipeline import care, runner, speedup
from pipeline.decide import Wanted, judge_all
from pipeline.job import Interrupted, Job
from pipeline.layout import RunPaths
from pipeline.seconds import read_seconds, sum_known, write_seconds
from stages import encode
from tests.cache.conftest import files_of
from tests.pipeline.toy import StopAfter, record, same, sharing, toy, weights


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run through its first two stages, beside the store in which its caches lie."""
    place = tmp_path_factory.mktemp("shared")
    runner.run_stage(sharing(place / "first", place / "store", target=2))
    return place


@pytest.fixture
def shared(first: Path, tmp_path: Path) -> Path:
    return shutil.copytree(first, tmp_path / "place")


def test_a_second_run_builds_nothing_says_from_where_and_owes_what_the_first_has_paid(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = shared / "store"
    caches = sorted(store.glob("cut-*"))
    before = {path: path.stat().st_mtime_ns for folder in caches for path in folder.rglob("*")}
    runner.run_all(sharing(shared / "second", store))
    told = capsys.readouterr().out
    assert len(caches) == 2 and all(f"current ({folder})" in told for folder in caches) and "built in" not in told
    assert {path: path.stat().st_mtime_ns for folder in caches for path in folder.rglob("*")} == before
    assert same(weights(shared / "first", "stage-2"), weights(shared / "second", "stage-2"))
    paid = 0.0
    for stage in (1, 2):
        mine, theirs = (record(shared / name, f"stage-{stage}") for name in ("second", "first"))
        assert mine["cache_seconds"] == 0 and theirs["cache_seconds_elsewhere"] == 0
        assert mine["cache_seconds_elsewhere"] == pytest.approx(theirs["cache_seconds"]) and theirs["cache_seconds"] > 0
        paid += theirs["cache_seconds"]
    arm = json.loads((shared / "second" / "speedup.json").read_text())["arms"]["cached"]
    assert arm["cache_seconds"] == pytest.approx(paid) == arm["cache_seconds_elsewhere"] and arm["cache_cost_known"]
    assert arm["total_seconds"] == pytest.approx(arm["train_seconds"] + paid)
    assert "were spent by other runs that share the caches" in told


def test_a_cost_that_nobody_noted_is_said_to_be_unknown(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(shared / "store/.permafrost/costs")
    runner.run_stage(sharing(shared / "second", shared / "store", target=2))
    assert record(shared / "second", "stage-1")["cache_seconds_elsewhere"] is None
    parts = [record(shared / "second", f"stage-{stage}") for stage in range(3)]
    assert speedup.arm_summary(parts)["cache_cost_known"] is False
    assert sum_known([1.0, 2.5]) == 3.5 and sum_known([1.0, None]) is None


def test_a_build_that_two_runs_share_counts_each_second_once(tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(Interrupted, match=r"cache 1 has \d of 6 shards"):
        runner.run_cache(sharing(tmp_path / "a", store, target=1, stop=StopAfter(8)))
    for receipt in store.glob("cut-1-*/receipts/view_1-*"):  # what was under way may have been done all the same
        receipt.unlink()
    runner.run_stage(sharing(tmp_path / "b", store, target=1))
    (folder,) = store.glob("cut-1-*")
    fingerprint = read_manifest(folder).fingerprint
    parts = [read_seconds(RunPaths(tmp_path / run).stage(1), fingerprint) for run in ("a", "b")]
    assert min(parts) > 0 and sum(parts) == pytest.approx(read_cost(folder).seconds)
    assert record(tmp_path / "b", "stage-1")["cache_seconds_elsewhere"] == pytest.approx(parts[0])


@pytest.mark.parametrize(("had", "wants", "share"), [(2, 1, 50.0), (1, 2, 100.0), (2, 3, 100.0)])
def test_rows_that_are_taken_over_cost_what_they_have_cost(tmp_path: Path, had: int, wants: int, share: float) -> None:
    """A cache of `had` views has cost 100 s; one of `wants` views owes for those that it takes, interrupted or not."""
    first, second = tmp_path / "first", tmp_path / "second"
    runner.run_stage(sharing(first, tmp_path / "store", toy(**{"cache.views": had}), target=1))
    (donor,) = (tmp_path / "store").glob("cut-1-*")
    write_cost(donor, Cost(100.0, 40.0))
    asked = sharing(second, tmp_path / "store", toy(**{"cache.views": wants}), target=1)
    with pytest.raises(Interrupted):
        runner.run_stage(replace(asked, stop=StopAfter(8)))
    runner.run_stage(asked)
    found = record(second, "stage-1")
    assert found["cache_seconds"] < 10 and found["cache_seconds_elsewhere"] == pytest.approx(share)
    (own,) = set((tmp_path / "store").glob("cut-1-*")) - {donor}
    cost = read_cost(own)
    assert cost.seconds == pytest.approx(share + found["cache_seconds"]), "and so do those who take from it"
    assert 0.4 * share <= cost.crowded <= 0.4 * share + found["cache_seconds"], "its share of what other work took, too"


def test_rows_from_a_cache_of_unknown_cost_make_a_cost_unknown(tmp_path: Path) -> None:
    store = tmp_path / "store"
    runner.run_stage(sharing(tmp_path / "first", store, target=1))
    shutil.rmtree(store / ".permafrost/costs")
    for run, views in (("second", 3), ("third", 4)):  # the third takes from the second
        runner.run_stage(sharing(tmp_path / run, store, toy(**{"cache.views": views}), target=1))
        found = record(tmp_path / run, "stage-1")
        assert found["cache_seconds"] > 0 and found["cache_seconds_elsewhere"] is None


def test_a_cache_that_was_removed_and_is_built_again_costs_what_it_costs_once(tmp_path: Path) -> None:
    run = sharing(tmp_path / "a", tmp_path / "store", target=1)
    runner.run_cache(run)
    (folder,) = run.paths.cache_root.glob("cut-1-*")
    fingerprint, paths = read_manifest(folder).fingerprint, run.paths.stage(1)
    write_seconds(paths, fingerprint, 100.0)
    write_cost(folder, Cost(100.0))
    shutil.rmtree(folder)
    runner.run_stage(run)
    found = record(tmp_path / "a", "stage-1")
    assert 0 < found["cache_seconds"] < 10 and found["cache_seconds_elsewhere"] == 0
    assert read_cost(folder).seconds == pytest.approx(found["cache_seconds"])


def test_clearing_up_leaves_what_another_run_uses(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, other = shared / "store", toy(**{"cache.views": 1})
    runner.run_cache(sharing(shared / "first", store, target=1))  # where it lies now, it uses what it uses
    runner.run_stage(sharing(shared / "second", store, other, target=1))
    own = sorted(set(store.glob("cut-*")) - set(first_caches(shared)))
    assert len(own) == 1
    care.run_gc(sharing(shared / "second", store, other, yes=True))
    told = capsys.readouterr().out
    for folder in first_caches(shared):
        assert folder.exists() and f"kept: {folder}: used by {shared / 'first'}" in told
    shutil.rmtree(shared / "first")  # a run that is gone counts no more
    care.run_gc(sharing(shared / "second", store, other, yes=True))
    assert sorted(store.glob("cut-*")) == own
    care.run_gc(sharing(shared / "second", store, other, yes=True))  # a second time there is nothing to do
    assert "nothing to remove" in capsys.readouterr().out and sorted(store.glob("cut-*")) == own


@pytest.mark.parametrize("keep", ["all", "needed"])
def test_a_run_of_the_same_path_on_another_machine_is_another_run(shared: Path, keep: str, capsys) -> None:
    run, store = shared / "first", shared / "store"
    runner.run_cache(sharing(run, store, target=1))
    (noted,) = (file for file in store.glob(".permafrost/users/*") if json.loads(file.read_text())["run"] == str(run))
    atomic_write(
        noted.with_name("elsewhere.json"),
        json.dumps(json.loads(noted.read_text()) | {"host": "elsewhere", "id": "f" * 32}).encode(),
    )
    if keep == "all":
        care.run_gc(sharing(run, store, toy(**{"cache.views": 1}), yes=True))
    else:
        runner.run_stage(sharing(run, store, toy(**{"cache.keep": "needed"}), target=2))
    told = f"used by {run} of elsewhere (no longer there? delete {noted.with_name('elsewhere.json')})"
    assert all(folder.exists() for folder in first_caches(shared)) and told in capsys.readouterr().out


def test_a_run_that_cannot_be_noted_says_so_once(shared: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refused(*_: object) -> None:
        raise CacheError("cannot write .permafrost: Permission denied")

    monkeypatch.setattr("pipeline.sharing.register", refused)
    told = (
        f"this run cannot be noted as a user of {shared / 'store'}: the owner's gc may remove what it reads; ask for "
        f"write access to {shared / 'store' / '.permafrost'}"
    )
    runner.run_stage(sharing(shared / "second", shared / "store", target=2))
    assert capsys.readouterr().out.count(told) == 1, "two caches were looked for"


def first_caches(shared: Path) -> list[Path]:
    wanted = Wanted(toy(), RunPaths(shared / "first", shared / "store"))
    return [wanted.cache_folder(spec) for stage in (1, 2) if (spec := wanted.cache_spec(stage))]


def test_clearing_up_spares_a_cache_that_is_being_built(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = shared / "store"
    stray = shutil.copytree(next(store.glob("cut-1-*")), store / "cut-9-00000000")
    gone = shutil.copytree(stray, store / "cut-9-11111111")
    with hold_cache(stray):
        care.run_gc(sharing(shared / "first", store, yes=True))
    assert stray.exists() and not gone.exists()
    assert re.search(rf"kept: {stray}: the cache at {stray} is busy: process \d+ works on it", capsys.readouterr().out)


def test_two_that_clear_up_at_once_remove_the_same_and_nothing_else(shared: Path) -> None:
    store = shared / "store"
    runner.run_cache(sharing(shared / "first", store, target=1))
    strays = [shutil.copytree(first_caches(shared)[0], store / f"cut-9-{n:08d}") for n in range(6)]
    errors: list[BaseException] = []

    def clear(one: Job) -> None:
        try:
            care.run_gc(one)
        except BaseException as error:
            errors.append(error)

    jobs = [sharing(shared / run, store, yes=True) for run in ("first", "second")]
    both = [threading.Thread(target=clear, args=(one,), daemon=True) for one in jobs]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(120)
    assert not any(thread.is_alive() for thread in both)
    assert errors == [] and not any(stray.exists() for stray in strays)
    assert sorted(store.glob("cut-*")) == sorted(first_caches(shared))


@pytest.mark.slow
def test_two_processes_that_build_one_cache_build_it_once(first: Path, tmp_path: Path) -> None:
    runs = [shutil.copytree(first / "first", tmp_path / name) for name in ("a", "b")]
    for run in runs:
        shutil.rmtree(run / "stage-1")
        shutil.rmtree(run / "stage-2")
    store = tmp_path / "store"
    args = ["-m", "pipeline", "cache", "1", "--config", str(runs[0] / "config.toml"), "--cache-root", str(store)]
    both = [
        subprocess.Popen([sys.executable, *args, "--run", str(run)], stdout=subprocess.PIPE, text=True) for run in runs
    ]
    told = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("built in" in text for text in told) == 1, told
    (folder,) = store.glob("cut-1-*")
    (wanted,) = (first / "store").glob("cut-1-*")
    assert verify_cache(folder) == [] and files_of(folder) == files_of(wanted)


# --- repair, whatever the settings say today --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"cache.shard_rows": 64, "cache.encode_batch": 5},
        {"cache.backend": "webdataset", "cluster.threads": 2},
        {"cache.filter": "zstd", "train.loader_threads": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_repair_keeps_layout_and_batches_of_the_cache(shared: Path, changes: dict[str, object]) -> None:
    store = shared / "store"
    folders = first_caches(shared)
    whole = [files_of(folder) for folder in folders]
    victims = [folders[0] / "data.zarr/view_1/features/c/1/0/0", folders[1] / "data.zarr/view_0/pixels/c/2/0/0"]
    victims[0].write_bytes(b"")
    victims[1].unlink()
    times = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("c/*/0*") if path.is_file()}
    care.run_repair(sharing(shared / "first", store, toy(**changes)))
    assert [files_of(folder) for folder in folders] == whole
    untouched = {path for path in times if "/c/1/" not in path.as_posix() and "/c/2/" not in path.as_posix()}
    assert len(untouched) > 4 and all(path.stat().st_mtime_ns == times[path] for path in untouched)


def test_a_repair_says_where_it_gave_other_bits(shared: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    first, second = first_caches(shared)
    for folder in (first, second):
        (folder / "data.zarr/view_1/features/c/1/0/0").unlink()
    plain = encode.frozen_forward

    def elsewhere(model: Any, job: Any, part: Any) -> Any:
        features, prefix = plain(model, job, part)
        return features * (1 + 2**-9 * (job.folder == str(second))), prefix

    monkeypatch.setattr(encode, "frozen_forward", elsewhere)
    care.run_repair(sharing(shared / "first", shared / "store"))
    told = [line for line in capsys.readouterr().out.splitlines() if "not to the bit what was there" in line]
    assert len(told) == 1 and str(second) in told[0]


@pytest.mark.parametrize("how", ["flip", "delete"])
def test_a_lost_manifest_costs_no_shard(shared: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    store = shared / "store"
    folder = first_caches(shared)[0]
    whole, path = files_of(folder), folder / "manifest.json"
    if how == "delete":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:99] + b"#" + content[100:])
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("c/*") if path.is_file()}
    care.run_repair(sharing(shared / "first", store))
    assert "manifest.json was damaged, its copy is in its place" in capsys.readouterr().out
    assert files_of(folder) == whole and all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert all(verdict.current for verdict in judge_all(Wanted(toy(), RunPaths(shared / "first", store)))[:5])


@pytest.mark.parametrize("version", [1, 99])
def test_a_repair_leaves_a_cache_of_another_version_alone(shared: Path, version: int, capsys) -> None:
    folder = first_caches(shared)[0]
    atomic_write(folder / "manifest.json", seal({**read_manifest(folder).to_dict(), "format": version}))
    before = files_of(folder)
    repairing = sharing(shared / "first", shared / "store")
    if version == 1:
        care.run_repair(repairing)
        assert "has format 1, this version reads" in capsys.readouterr().out
    else:
        with pytest.raises(CacheError, match=r"has format 99, .* a later version made it and may need it; update"):
            care.run_repair(repairing)
    assert files_of(folder) == before
