"""A run's files have the contract's names, and only one process works in a run."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.layout import RunBusy, RunPaths, run_paths

REPOSITORY = Path(__file__).parents[2]


def test_names_of_the_contract() -> None:
    paths = run_paths("runs/sample", "")
    assert paths.root == Path("runs/sample")
    names = {
        paths.config: "config.toml",
        paths.plan: "plan.json",
        paths.events: "events.jsonl",
        paths.stage(2).json: "stage-2/stage.json",
        paths.stage(2).model: "stage-2/model.safetensors",
        paths.stage(2).last: "stage-2/last",
        paths.cache_root: "cache",
        paths.arm("e2e").json: "arms/e2e/stage.json",
        paths.speedup: "speedup.json",
        paths.report: "report.html",
        paths.figures: "figures",
        paths.export: "export",
    }
    assert {path: str(path.relative_to(paths.root)) for path in names} == names


def test_run_and_cache_root_can_be_elsewhere() -> None:
    paths = run_paths("/data/run", "/scratch/caches")
    assert (paths.root, paths.cache_root) == (Path("/data/run"), Path("/scratch/caches"))


def test_lock_lets_go_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    with pytest.raises(KeyError), paths.lock():
        raise KeyError
    assert paths.holder() is None
    with paths.lock():
        assert paths.holder() == os.getpid()
    assert paths.holder() is None


def test_without_flock_a_process_of_this_host_is_refused_and_the_dead_are_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    (paths.root / ".lock").write_text("4321\nelsewhere\n")
    (paths.root / ".lock.pid").write_text(str(os.getppid()))
    monkeypatch.setattr("fcntl.flock", lacking)
    with pytest.raises(RunBusy, match=f"in use by process {os.getppid()};"), paths.lock():
        pass
    done = subprocess.Popen(["true"])
    done.wait()
    (paths.root / ".lock.pid").write_text(str(done.pid))
    for _ in range(2):
        with paths.lock():
            assert paths.holder() == os.getpid()
        assert paths.holder() is None


def test_second_process_is_refused_and_kill_9_lets_go(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    hold = (
        "import sys, time; from pathlib import Path; from pipeline.layout import RunPaths\n"
        "with RunPaths(Path(sys.argv[1])).lock():\n    print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(paths.root)], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert paths.holder() == other.pid
        with pytest.raises(RunBusy, match=rf"{paths.root} is in use by process {other.pid};.*--run"), paths.lock():
            pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate(timeout=60)
    assert (paths.root / ".lock.pid").exists() and paths.holder() is None
    with paths.lock():
        pass
