"""Dropped depth in a whole run: resumed bit for bit, and part of what a stage depends on."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import runner
from pipeline.decide import Wanted, judge_all
from pipeline.job import Interrupted
from pipeline.layout import RunPaths
from stages.checkpoint import read_state
from tests.pipeline.toy import StopAfter, job, same, toy, weights

DROPS = {"train.drop_path": 0.3, "train.layer_drop": 0.8}


@pytest.fixture(scope="module")
def dropped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "toy"
    runner.run_stage(job(root, toy(**DROPS), target=2))
    return root


@pytest.mark.parametrize("asked", [2, 9, 17])
def test_interrupted_anywhere_ends_with_the_same_bits(dropped: Path, tmp_path: Path, asked: int) -> None:
    root = tmp_path / "toy"
    with pytest.raises(Interrupted, match="goes on from there"):
        runner.run_stage(job(root, toy(**DROPS), target=2, stop=StopAfter(asked)))
    runner.run_stage(job(root, toy(**DROPS), target=2))
    for stage in range(3):
        file = f"stage-{stage}/last/state.safetensors"
        assert same(read_state(dropped / file)[2], read_state(root / file)[2])


def test_dropping_changes_what_learns_and_nothing_that_is_frozen(dropped: Path, finished: Path) -> None:
    assert not same(weights(finished, "stage-0"), weights(dropped, "stage-0"), "blocks.3.")
    assert same(weights(dropped, "stage-0"), weights(dropped, "stage-2"), "blocks.0.")


@pytest.mark.parametrize(("name", "value"), [("drop_path", 0.1), ("layer_drop", 0.5)])
def test_a_rate_makes_every_stage_stale(finished: Path, name: str, value: float) -> None:
    config = toy(**{f"train.{name}": value})
    found = {v.what: v.reason for v in judge_all(Wanted(config, RunPaths(finished)))}
    assert found["stage 0"] == f"train.{name}: 0.0 -> {value}"


def test_layer_dropping_depends_on_the_length_of_the_run(tmp_path: Path) -> None:
    constant = {"train.lr_schedule": "constant"}
    plain, dropping = (Wanted(toy(**constant | more), RunPaths(tmp_path)) for more in ({}, DROPS))
    assert "schedule.total_steps" not in plain.stage_inputs(0)
    assert dropping.stage_inputs(0)["schedule.total_steps"] == 24
