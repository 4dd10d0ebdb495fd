"""What a person asks of a run besides training: a plan, a benchmark, scores, a comparison; and FreezeOut's schedule."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cache.size import cache_bytes
from pipeline import bench, bench_others, bench_step, care, costs, runner, speedup, status
from pipeline.config import ConfigError
from pipeline.decide import Wanted, judge_all
from pipeline.job import Interrupted, RunFailed
from pipeline.layout import RunPaths
from pipeline.rates import flop_bound, stage_rates, step_runner
from stages.index import indexed
from stages.sources import CachedFeatures
from tests.pipeline.toy import StopAfter, job, record, same, toy, weights
from tests.stages.conftest import encoded, in_folder


def test_plan_prices_every_stage_and_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs.show_plan(job(tmp_path / "toy"))
    plan = json.loads((tmp_path / "toy" / "plan.json").read_text())
    assert [stage["cut"] for stage in plan["stages"]] == [0, 1, 3]
    assert all(stage["state"] == "missing" and stage["e2e_seconds"] > 0 for stage in plan["stages"])
    wanted = Wanted(toy(), RunPaths(tmp_path / "toy"))
    assert [s["cache_bytes"] for s in plan["stages"]] == [
        0,
        cache_bytes(wanted.layout(wanted.features(1))),
        cache_bytes(wanted.layout(wanted.features(2))),
    ]
    cached = sum(s["cached_seconds"] + s["cache_seconds"] for s in plan["stages"])
    assert plan["cached_seconds"] == pytest.approx(cached)
    assert plan["speedup_total"] == pytest.approx(plan["e2e_seconds"] / cached)
    assert "break-even" in capsys.readouterr().out
    assert not (tmp_path / "toy" / "stage-0").exists() and not (tmp_path / "toy" / "cache").exists()


def test_predicted_bytes_are_those_on_disk(finished: Path) -> None:
    wanted = Wanted(toy(), RunPaths(finished))
    for stage in (1, 2):
        folder = wanted.cache_folder(wanted.cache_spec(stage))
        written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        assert cache_bytes(wanted.layout(wanted.features(stage))) == pytest.approx(written, rel=0.05)


def test_bench_gives_rates_of_every_arm_at_every_cut(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "stage_rates", lambda *args, **_: stage_rates(*args, seconds=0.05, rounds=2))
    monkeypatch.setattr(bench, "ROUNDS", 2)
    monkeypatch.setattr(bench_step, "ROUNDS", 1)
    monkeypatch.setattr(bench_step, "PROFILES", 2)
    monkeypatch.setattr(bench_step, "compiler", lambda: None)
    monkeypatch.setattr(bench_others, "PEERS_PYTHON", copy / "none")
    bench.run_bench(job(copy, toy(**{"bench.rows": 16, "bench.rounds": 1, "bench.shards": 1})))
    found = json.loads((copy / "bench.json").read_text())["arms"]
    assert [row["cut"] for row in found] == [1, 3]
    for row in found:
        assert row["images_per_second"].keys() == {"e2e", "freeze", "cached", "memory", "loader"}
        assert all(len(rates) == 2 and min(rates) > 0 for rates in row["images_per_second"].values())
        assert len(row["cached_waiting"]) == 2 and all(0 < share < 1 for share in row["cached_waiting"])
    assert found[1]["flop_bound"] > found[0]["flop_bound"] > 1
    bounds = json.loads((copy / "bench.json").read_text())["kernel_bounds"]
    assert bounds.keys() == {"1", "3"} and all(len(bound) == 2 for bound in bounds.values())
    methods = json.loads((copy / "bench.json").read_text())["methods"]
    assert methods["pixels, one decoder"] == {"live": [1.0, 1.0], "cached": [1.0, 1.0]}
    assert all(len(values) == 2 and min(values) > 0 for ratios in methods.values() for values in ratios.values())
    absent = {name for name, ratios in methods.items() if "cached" not in ratios}
    assert absent == {"4 heads", "4 heads, hog, scales 4 2 1 ½"}, "this model is too shallow for LocalMIM's places"
    only_cached = {name for name, ratios in methods.items() if "live" not in ratios}
    assert only_cached == absent | {"features", "teacher, frozen"}
    out = capsys.readouterr().out
    assert "cached / step alone" in out and "cached waits" in out and "cut 3: the step bounds" in out
    assert "of the kernels' bound" in out


def test_what_bounds_is_the_slower_of_step_and_loader() -> None:
    rates = {"cached": [90.0, 80.0, 70.0], "memory": [100.0] * 3, "loader": [400.0] * 3}
    assert bench.bounding(rates) == "the step bounds (100 images/s, the loader could 400); training reaches 0.80 of it"
    rates |= {"memory": [800.0] * 3}
    assert bench.bounding(rates) == "the loader bounds (400 images/s, the step could 800); training reaches 0.20 of it"


def test_a_slow_loader_shows_in_the_share_spent_waiting(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that sleeps 100 ms a batch against a step of a few ms."""
    wanted, load = Wanted(toy(**{"train.loader_threads": 1}), RunPaths(finished)), CachedFeatures.load

    def slow(*args: Any) -> Any:
        time.sleep(0.1)
        return load(*args)

    fast = step_runner(wanted, 2, "memory")(0.3)
    monkeypatch.setattr(CachedFeatures, "load", slow)
    waits = step_runner(wanted, 2, "cached")(1.0)
    step = 1 / fast.images_per_second * 16
    assert waits.images_per_second <= 16 / 0.1
    assert fast.waiting < 0.3 and waits.waiting == pytest.approx(1 - step / 0.1, abs=0.2)


def test_flop_bound_is_counted_on_the_step(finished: Path) -> None:
    """Every linear layer by hand: FLOPs of the e2e step over those of the cached step at cut 3 of 4."""
    tokens, visible, width, inner = 16, 4, 32, 16

    def block(count: int, channels: int) -> int:
        return count * 12 * channels**2 + 2 * count**2 * channels

    hidden = tokens - visible
    last = (2 * tokens + 10 * hidden) * inner**2 + 2 * tokens * hidden * inner  # keys and values of all
    decoder = visible * width * inner + last + hidden * inner * width + hidden * width * 48
    learning = 3 * (4 * block(visible, width) + decoder) + 2 * tokens * 48 * width  # no gradient for pixels
    cached = 3 * (block(visible, width) + decoder)
    assert flop_bound(Wanted(toy(), RunPaths(finished)), 2) == pytest.approx(learning / cached, rel=1e-6)


def test_probe_scores_what_the_record_says(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner.run_probe(job(copy, target=2))
    out = capsys.readouterr().out
    assert "stage 2" in out and "stage 1" not in out and f"{record(copy, 'stage-2')['knn_top1']:.3f}" in out
    runner.run_probe(job(copy))
    assert "arm freeze" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no trained"):
        runner.run_probe(job(copy / "nowhere"))


def test_status_tells_of_every_part_and_of_no_run(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status.show_status(job(finished))
    out = capsys.readouterr().out
    assert all(part in out for part in ("stage 0", "stage 2", "arm e2e", "no process is working here"))
    with pytest.raises(ConfigError, match="no run in"):
        status.show_status(job(finished / "nowhere"))


def test_a_comparison_is_kept_until_what_it_compares_changes(copy: Path) -> None:
    before = (copy / "speedup.json").stat().st_mtime_ns
    runner.run_all(job(copy))
    assert (copy / "speedup.json").stat().st_mtime_ns == before
    stage = record(copy, "stage-2") | {"state": "other"}
    (copy / "stage-2" / "stage.json").write_text(json.dumps(stage))
    assert speedup.current_comparison(Wanted(toy(), RunPaths(copy))) is None


def test_freezeout_gives_stages_of_its_own_length(tmp_path: Path) -> None:
    config = toy(
        **{
            "schedule.kind": "freezeout",
            "schedule.t0": 0.3,
            "schedule.scale": "linear",
            "schedule.epochs": [6],
            "train.warmup_epochs": 0.0,
        }
    )
    runner.run_stage(job(tmp_path / "toy", config, target=2))
    # 36 steps, 6 an epoch: layer 1 learns up to step 17.1, layer 3 up to 29.7.
    assert [record(tmp_path / "toy", f"stage-{k}")["epochs"] for k in range(3)] == [3, 2, 1]
    before, after = weights(tmp_path / "toy", "stage-0"), weights(tmp_path / "toy", "stage-2")
    assert same(before, after, "blocks.0.") and not same(before, after, "blocks.1.")


def test_unlabelled_images_train_and_compare_without_scores(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    index, read = indexed(str(Path(__file__).parents[2] / "data/sample/val-000000.tar"), "stop", None)
    for entry in index.entries[:80]:
        (folder / f"{entry.key}.png").write_bytes(read(entry))  # type: ignore[arg-type]
    config = toy(**{"data.source": str(folder), "data.limit": 0, "schedule.epochs": [1, 1, 1]})
    runner.run_all(job(tmp_path / "toy", config))
    found = json.loads((tmp_path / "toy" / "speedup.json").read_text())
    assert found["arms"]["cached"]["knn_top1"] is None and found["early_stop"]["linear_top1"] is None
    assert found["arms"]["cached"]["curve"][-1]["effective_rank"] > 1


def test_held_out_images_that_are_training_images_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 60 names three are held out; one of those has the content of another, that is trained on."""
    files = {f"{row:02d}.png": encoded(row) for row in range(60)}
    folder = in_folder(tmp_path / "images", files | {"41.png": files["03.png"]})
    config = toy(**{"data.source": str(folder), "data.limit": 0})
    with pytest.raises(Interrupted):
        runner.run_stage(job(tmp_path / "toy", config, target=0, stop=StopAfter(0)))
    told = "evaluation: 1 left out, as training has the same image, first 41.png, the same as 03.png"
    assert told in " ".join(capsys.readouterr().out.split())


def test_verify_names_a_cache_that_was_never_finished(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    next(copy.glob("cache/cut-1-*/manifest.json")).unlink()
    with pytest.raises(RunFailed, match="1 damaged"):
        care.run_verify(job(copy))
    assert "manifest.json" in capsys.readouterr().out


def test_verify_takes_a_half_built_cache_for_no_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="no cache in"):
        care.run_verify(job(tmp_path / "toy"))
    with pytest.raises(Interrupted, match=r"cache 1 has \d of 6 shards"):
        runner.run_cache(job(tmp_path / "toy", target=1, stop=StopAfter(8)))
    care.run_verify(job(tmp_path / "toy"))
    assert "unfinished" in capsys.readouterr().out


def test_an_edited_image_makes_everything_stale(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    index, read = indexed(str(Path(__file__).parents[2] / "data/sample/val-000000.tar"), "stop", None)
    for entry in index.entries[:60]:
        (folder / f"{entry.key}.png").write_bytes(read(entry))  # type: ignore[arg-type]
    config = toy(**{"data.source": str(folder), "data.limit": 0})
    paths = RunPaths(tmp_path / "toy")
    runner.run_stage(job(paths.root, config, target=1))
    victim = sorted(folder.iterdir())[0]
    victim.write_bytes(next(read(e) for e in index.entries[60:]))  # type: ignore[arg-type]
    reasons = {verdict.what: verdict.reason for verdict in judge_all(Wanted(config, paths))}
    assert reasons["stage 0"].startswith("data: ")


def test_a_plan_of_one_stage_trains_it_and_compares_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy(**{"schedule.cuts": [0], "schedule.epochs": [1]})
    runner.run_all(job(tmp_path / "toy", config))
    assert "freezes nothing" in capsys.readouterr().out and not (tmp_path / "toy" / "speedup.json").exists()
    assert [verdict.what for verdict in judge_all(Wanted(config, RunPaths(tmp_path / "toy")))] == ["stage 0"]
    costs.show_plan(job(tmp_path / "toy", config))
    assert json.loads((tmp_path / "toy" / "plan.json").read_text())["speedup_total"] == 1
    with pytest.raises(ConfigError, match="freezes nothing"):
        runner.run_arm(job(tmp_path / "toy", config, target="e2e"))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_loading_wakes_no_threads_of_torch(finished: Path, stage: int) -> None:
    """A pool of the loader's own spins after each use and costs the step 15-20 %. In a process of its own: a pool that
    is there already would hide one that is woken."""
    code = (
        "import os, sys, threading, torch\n"
        "from pathlib import Path\n"
        "from cache.buffers import Buffers\n"
        "from pipeline.decide import Wanted\n"
        "from pipeline.feeds import source_for\n"
        "from pipeline.layout import RunPaths\n"
        "from tests.pipeline.toy import toy\n"
        "torch.set_num_threads(2)\n"
        "stage = int(sys.argv[2])\n"
        "wanted = Wanted(toy(), RunPaths(Path(sys.argv[1])))\n"
        "segment = wanted.segments[stage]\n"
        "source = source_for(wanted, stage)\n"
        "tasks, found = lambda: len(os.listdir('/proc/self/task')), []\n"
        "def load():\n"
        "    before = tasks()\n"
        "    source.load(segment, 0, Buffers())\n"
        "    found.append(tasks() - before)\n"
        "thread = threading.Thread(target=load)\n"
        "thread.start(); thread.join()\n"
        "print(found)\n"
    )
    command = [sys.executable, "-c", code, str(finished), str(stage)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], timeout=120
    )
    assert done.stdout == "[0]\n", done.stdout + done.stderr
