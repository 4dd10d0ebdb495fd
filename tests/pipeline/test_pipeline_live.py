"""The live view: bars on terminals only, plain lines elsewhere, nothing drawn between events; `status` beside a run."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.building import Pace
from pipeline.events import EventLog
from pipeline.layout import RunPaths
from pipeline.live import clock, progress_line, seconds_left
from pipeline.status import ahead, last_progress, show_status
from tests.pipeline.toy import job

SHARD = {"stage": 1, "cache": "cache 1", "cut": 1, "shard": 2, "shards": 8, "images": 500, "images_per_second": 50.0}
STEP = {"stage": 1, "step": 10, "steps": 40, "images": 160, "loss": 0.5, "images_per_second": 32.0}
STEP |= {"loader_wait_fraction": 0.013}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_cache_in_the_making_is_told_with_its_time_left() -> None:
    # 6 of 8 shards are left, 1,500 images at 50 images/s
    assert progress_line(SHARD) == "cache 1 (cut 1)  shard 2/8  50 images/s  0:30 left"
    assert progress_line(SHARD | {"shard": 8, "images": 2000}) == "cache 1 (cut 1)  shard 8/8  50 images/s"
    first = {"stage": 1, "cache": "cache 1", "cut": 1, "shard": 1, "shards": 2, "repair": True}
    assert progress_line(first) == "repairing cache 1 (cut 1)  shard 1/2"
    assert seconds_left(STEP) == 30 * 16 / 32 and seconds_left(STEP | {"step": 40}) is None
    assert [clock(seconds) for seconds in (4.6, 60, 3599.4, 11220)] == ["0:05", "1:00", "59:59", "3:07:00"]


def test_the_pace_counts_from_the_first_shard_that_was_told() -> None:
    clock = iter([100.0, 102.0, 104.0])
    pace = Pace(1000, now=lambda: next(clock))
    assert pace(7, 10) == {"shard": 7, "shards": 10, "images": 700}, "seven may have been there already"
    assert pace(8, 10)["images_per_second"] == 50.0
    assert pace(10, 10) == {"shard": 10, "shards": 10, "images": 1000, "images_per_second": 75.0}


def test_bars_for_caches_and_training_each_on_a_line_of_its_own(tmp_path: Path, terminal: Terminal) -> None:
    clock, threads = iter(range(20)), threading.active_count()
    with EventLog(tmp_path / "e.jsonl", out=terminal, now=lambda: float(next(clock))) as log:
        for shard in (1, 2, 8):
            log(SHARD | {"shard": shard, "images": 250 * shard})
        assert terminal.getvalue().endswith("\x1b[?25h"), "finished: the cursor is back"
        log(STEP)
        log(STEP | {"step": 20, "images": 320})
        assert threading.active_count() == threads, "nothing is drawn in between"
    shown = terminal.getvalue()
    assert "cache 1 (cut 1)" in shown and "shard 8/8" in shown and "━" in shown
    assert "step 20/40  32 images/s  loss 0.500  waiting 1 %  0:10 left" in shown
    last_of_cache = shown.rindex("shard 8/8")
    assert "\n" in shown[last_of_cache : shown.index("stage 1", last_of_cache)], "its line stays"


def test_a_pipe_gets_plain_lines_whatever_forces_colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    out, clock = io.StringIO(), iter([0.0, 1.0, 20.0, 21.0, 40.0])
    with EventLog(tmp_path / "e.jsonl", out=out, now=lambda: next(clock)) as log:
        for event in (SHARD, SHARD | {"shard": 3}, SHARD | {"shard": 8, "images": 2000}, STEP, STEP | {"step": 20}):
            log(event)
    assert out.getvalue().splitlines() == [
        "cache 1 (cut 1)  shard 2/8  50 images/s  0:30 left",
        "cache 1 (cut 1)  shard 8/8  50 images/s",
        progress_line(STEP | {"step": 20}),
    ]


def test_tensorboard_has_what_the_live_view_shows(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished / "tensorboard")).Reload()
    tags, pictures = set(board.Tags()["scalars"]), set(board.Tags()["images"])
    fields = ("loss", "loss_block4_pixels", "lr", "images_per_second", "loader_wait_fraction")
    for place in ("stage-0", "stage-2", "e2e", "freeze"):
        probes = ("knn_top1", "linear_top1", "effective_rank", "feature_std")
        assert {f"{place}/{name}" for name in (*fields, *probes)} <= tags
    assert {"stage-1/cache-1/images", "stage-2/cache-2/images_per_second"} <= tags
    assert {f"{place}/reconstructions" for place in ("stage-0", "stage-1", "stage-2", "e2e", "freeze")} <= pictures
    (picture,) = board.Images("stage-2/reconstructions")
    assert picture.step == json.loads((finished / "stage-2" / "stage.json").read_text())["steps"]


# --- status ---------------------------------------------------------------------------------------------------------

PLAN = [
    {"stage": k, "cut": cut, "cached_seconds": 10.0 * k, "cache_seconds": 5.0 * k}
    | {"e2e_seconds": 30.0, "freeze_seconds": 20.0}
    for k, cut in enumerate((0, 1, 3))
]


def test_status_tells_what_is_at_work_and_what_follows(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = RunPaths(copy)
    record = json.loads((copy / "stage-1" / "stage.json").read_text())
    (copy / "stage-1" / "stage.json").write_text(json.dumps(record | {"status": "running"}))
    (copy / "arms" / "freeze" / "stage.json").unlink()
    with paths.events.open("a") as file:
        file.write(json.dumps({"time": 0.0} | STEP) + '\n{"time": 1.0, "half a li')
    paths.plan.write_text(json.dumps({"stages": PLAN}))
    show_status(job(copy))
    assert "no process is working here" in (shown := capsys.readouterr().out) and "goes on" not in shown
    with paths.lock():
        show_status(job(copy))
    shown = capsys.readouterr().out
    assert f"process {os.getpid()} is working" in shown and progress_line(STEP) in shown
    # stage 1 has 15 s to go, stage 2 takes 20 + 10, arm freeze the 20 of stages 1 and 2 each; arm e2e is done
    assert (
        "`make all` goes on with stage 2 0:30, arm freeze 0:40, as `make plan` predicts: 1:25 left in all, without "
        "evaluation"
    ) in " ".join(shown.split())


def test_what_follows_a_cache_is_its_stage_and_nothing_is_made_up(copy: Path) -> None:
    paths = RunPaths(copy)
    assert ahead(paths, SHARD) == "", "without a plan nobody knows"
    paths.plan.write_text(json.dumps({"stages": PLAN}))
    # 30 s of the cache, 10 of stage 1, 20 + 10 of stage 2; both arms are done
    assert "goes on with stage 1 0:10, stage 2 0:30, as `make plan` predicts: 1:10 left" in ahead(paths, SHARD)
    arm = {"arm": "freeze", "step": 1, "steps": 2}
    assert ahead(paths, arm) == ""
    shutil.copytree(copy / "stage-2", copy / "stage-2.bak")  # is no stage
    shutil.rmtree(copy / "stage-2")
    assert "goes on with stage 2 0:30, as `make plan` predicts: 0:30 left" in ahead(paths, arm)
    paths.plan.write_text(json.dumps({"stages": [stage | {"cut": 2} for stage in PLAN]}))
    assert ahead(paths, SHARD) == "", "a plan of other stages says nothing"


def test_status_finds_the_last_progress_of_a_log_that_grows(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert last_progress(path) is None
    noise = json.dumps({"stage": 1, "probe": True, "knn_top1": 0.5})
    path.write_text("\n".join((json.dumps(STEP), json.dumps(SHARD), noise, '{"stage": 1, "step": 99')))
    assert last_progress(path) == SHARD


def test_status_loads_nothing_that_takes_its_time_and_writes_nothing(copy: Path) -> None:
    """It takes less than a second of a processor, which `watch` may ask for again and again; torch alone takes more."""
    before = {file: file.stat().st_mtime_ns for file in copy.rglob("*")}
    call = [sys.executable, "-X", "importtime", "-m", "pipeline", "status"]
    call += ["--config", str(copy / "config.toml"), "--run", str(copy)]
    done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=120)
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "pipeline" in loaded and not loaded & {"torch", "timm", "matplotlib", "sklearn", "distributed", "scipy"}
    assert "stage 2" in done.stdout and "\x1b" not in done.stdout
    assert {file: file.stat().st_mtime_ns for file in copy.rglob("*")} == before
