"""Several calls of studies at once: what one of them trains the others neither train too nor wait for."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from pipeline import study as engine
from pipeline import work
from pipeline.decide import Wanted
from pipeline.pool import alone
from tests.pipeline.toy import ask


def parts(seed: int) -> list[str]:
    """What is trained of a seed by one call, in order."""
    return [f"e2e-seed-{seed}/{part}" for part in ("stage-0", "stage-1", "e2e")] + [f"one-seed-{seed}/stage-1"]


def test_what_another_call_trains_is_left_to_it_by_all_runs_that_share_it(
    studies: None, trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = ask(tmp_path, "--seeds", "0", "1")
    (elsewhere,) = ask(tmp_path / "other", "--seeds", "0", "--only", "one").asked
    with alone(Wanted(elsewhere.config, elsewhere.paths), request.pool):
        engine.carry_out(request)
    assert trained == parts(1)
    out = capsys.readouterr().out
    for label in ("e2e, seed 0", "one, seed 0"):
        assert f"{label}: left to another process: its stage-0 is being trained in another run" in out

    trained.clear()
    engine.carry_out(request)
    assert trained == parts(0)


def test_a_call_comes_back_to_what_it_has_left_when_its_other_runs_are_done(
    studies: None, trained: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, other = ask(tmp_path, "--seeds", "0", "1"), ExitStack()
    train = work.train

    def other_ends_meanwhile(*args: Any, **more: Any) -> None:
        other.close()
        train(*args, **more)

    monkeypatch.setattr(work, "train", other_ends_meanwhile)
    first = request.asked[0]
    other.enter_context(alone(Wanted(first.config, first.paths), request.pool))
    engine.carry_out(request)
    assert trained == parts(1) + parts(0)
