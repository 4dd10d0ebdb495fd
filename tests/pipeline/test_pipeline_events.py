"""Events: whole JSON lines on disk, sparse lines where nobody watches, scalars for TensorBoard."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from pipeline.events import EventLog, probe_line, progress_line

STEP = {
    "kind": "step",
    "arm": "stage-1",
    "step": 40,
    "steps": 100,
    "images": 2560,
    "loss": 0.91234,
    "images_per_second": 64.0,
    "loader_wait_fraction": 0.02,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_are_json_lines_with_a_time_and_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    clock = iter([10.0, 20.0])
    for _ in range(2):
        with EventLog(path, show=False, now=lambda: next(clock)) as log:
            log({"arm": "e2e", "step": 1, "loss": 0.5})
            assert lines(path)[-1]["loss"] == 0.5, "flushed at once"
    assert lines(path) == [{"time": now, "arm": "e2e", "step": 1, "loss": 0.5} for now in (10.0, 20.0)]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, show=False) as log:
        log({"loss": float("nan"), "lr": float("inf")})
    assert lines(path)[0] | {"time": 0} == {"time": 0, "loss": None, "lr": None}


def test_half_a_line_of_a_killed_process_spoils_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"step": 1}\n{"ste')
    with EventLog(path, show=False, now=lambda: 0.0) as log:
        log({"step": 2})
    assert path.read_text().splitlines() == ['{"step": 1}', '{"ste', '{"time": 0.0, "step": 2}']


def test_progress_line() -> None:
    # 60 steps of 2560 / 40 = 64 images at 64 images/s
    want = "stage 1  step 40/100  64 images/s  loss 0.912  waiting 2 %  1:00 left"
    assert progress_line(STEP) == want
    assert progress_line({"stage": 3, "step": 7}) == "stage 3  step 7"
    assert probe_line({"arm": "e2e", "epoch": 4.0, "knn_top1": 0.3, "linear_top1": 0.4}) == (
        "e2e  epoch 4  kNN 0.300  linear probe 0.400"
    )


def test_plain_output_is_sparse_but_shows_messages_probes_and_the_last_step(tmp_path: Path) -> None:
    out, clock = io.StringIO(), iter([0.0, 1.0, 9.0, 10.5, 11.0, 12.0])
    with EventLog(tmp_path / "e.jsonl", out=out, now=lambda: next(clock)) as log:
        for step in (1, 2, 3, 4):
            log(STEP | {"step": step})
        log.message("cut 3: [building] 8 shards")
        log({"arm": "stage-1", "epoch": 2.0, "knn_top1": 0.25})
        log(STEP | {"step": 100})
    shown = [line.split("  ")[:2] for line in out.getvalue().splitlines()]
    assert shown == [
        ["stage 1", "step 1/100"],
        ["stage 1", "step 4/100"],
        ["cut 3: [building] 8 shards"],
        ["stage 1", "epoch 2"],
        ["stage 1", "step 100/100"],
    ]


def test_terminal_line_is_redrawn_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, clock = Terminal(), iter(range(10))
    with EventLog(tmp_path / "e.jsonl", out=out, now=lambda: float(next(clock))) as log:
        log(STEP)
        log(STEP | {"step": 41})
        assert "step 40/100" in out.getvalue() and "step 41/100" in out.getvalue()
        assert "\x1b[2K" in out.getvalue(), "the line before is erased"
        log.message("a message")
    assert "a message" in out.getvalue()
    assert out.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"


def test_hidden_log_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EventLog(tmp_path / "e.jsonl", show=False) as log:
        log(STEP)
        log.message("x")
    assert capsys.readouterr() == ("", "")


def test_scalars_reach_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with EventLog(tmp_path / "e.jsonl", tmp_path / "board", show=False) as log:
        log(STEP)
        log(STEP | {"step": 50, "loss": 0.5})
        log({"arm": "stage-1", "epoch": 2.0, "knn_top1": 0.25})
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = board.Tags()["scalars"]
    points = {tag: [(point.step, round(point.value, 5)) for point in board.Scalars(tag)] for tag in tags}
    assert points["stage-1/loss"] == [(40, 0.91234), (50, 0.5)]
    assert points["stage-1/knn_top1"] == [(2, 0.25)]
    assert points["stage-1/images"] == [(40, 2560), (50, 2560)]
    assert "stage-1/steps" not in points
