"""`decoder.carry = false` in a run: which arms begin with new decoders, what becomes stale, what is shared, and that
all of it goes on to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.learner import Learner
from models.mim import MaskedModel
from pipeline import equivalence, runner
from pipeline.decide import Wanted, judge_arm, judge_stage
from pipeline.job import Interrupted
from pipeline.layout import RunPaths
from pipeline.work import masked_build
from stages import train
from stages.checkpoint import read_state
from stages.train import build_model
from tests.pipeline.toy import StopAfter, job, same, toy, weights

STATE = "last/state.safetensors"
ANEW = toy(**{"decoder.carry": False})
Started = dict[str, dict[str, Tensor]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """The whole model with which each segment begins, by arm and the segment's place."""
    found: Started = {}
    plain = train.train_segment

    def spy(arm: Any, segment: Any, model: Learner, optimizer: Any, progress: Any, *more: Any) -> None:
        if not progress.step:
            assert isinstance(model, MaskedModel)
            state = {f"decoder/{name}": value.clone() for name, value in model.heads.state_dict().items()}
            state |= {f"encoder/{name}": value.clone() for name, value in model.encoder.vit.state_dict().items()}
            found[f"{arm.label} {progress.segment}"] = state
        plain(arm, segment, model, optimizer, progress, *more)

    monkeypatch.setattr(train, "train_segment", spy)
    return found


def test_stages_and_the_freeze_arm_begin_anew_alike_and_e2e_never(copy: Path, started: Started) -> None:
    wanted = Wanted(ANEW, RunPaths(copy))
    before = read_state(copy / "stage-0" / STATE)[2]
    assert judge_stage(wanted, 0).current and judge_arm(wanted, "e2e").current, "neither has a stage that begins"
    for verdict in (judge_stage(wanted, 1), judge_stage(wanted, 2), judge_arm(wanted, "freeze")):
        assert (verdict.state, verdict.reason) == ("stale", "decoder.carry: (none) -> False")
    runner.run_stage(job(copy, ANEW, target=2))
    runner.run_arm(job(copy, ANEW, target="freeze"))
    assert sorted(started) == ["arm freeze 0", "arm freeze 1", "stage 1 0", "stage 2 0"], "stage 0 stays"
    fresh = {
        stage: build_model(masked_build(wanted, stage, cached=True), wanted.cut(stage), "cpu", stage=stage)
        for stage in (1, 2)
    }
    for stage, begun in ((1, "stage 1 0"), (2, "stage 2 0"), (1, "arm freeze 0"), (2, "arm freeze 1")):
        want = {f"decoder/{name}": value for name, value in fresh[stage].heads.state_dict().items()}
        assert same(want, started[begun]), f"{begun} has the decoder that seed and stage give"
    for begun in ("stage 1 0", "arm freeze 0"):
        assert same(before, started[begun], "encoder/"), "the encoder is that which stage 0 ended with"
        assert not torch.equal(before[name := "decoder/block4.decoder.mask_token"], started[begun][name])
    assert same(read_state(copy / "stage-1" / STATE)[2], started["stage 2 0"], "encoder/")
    assert judge_arm(Wanted(ANEW, RunPaths(copy)), "freeze").current
    equivalence.run_equivalence(job(copy, ANEW))


def test_carried_over_is_the_default_and_no_input(finished: Path, copy: Path, started: Started) -> None:
    wanted = Wanted(toy(), RunPaths(finished))
    named = {"decoder.depth": 1, "decoder.width": 16, "decoder.heads": 2, "decoder.share": 1.0}
    for inputs in (*(wanted.stage_inputs(stage) for stage in range(3)), *map(wanted.arm_inputs, ("e2e", "freeze"))):
        assert {key: value for key, value in inputs.items() if key.startswith("decoder.")} == named
    assert Wanted(ANEW, RunPaths(finished)).stage_inputs(0) == wanted.stage_inputs(0), "one stage 0 serves both"
    for part in ("stage-1", "arms/e2e"):
        (copy / part / "stage.json").unlink()
        (copy / part / STATE).unlink()
    runner.run_stage(job(copy, target=1))
    runner.run_arm(job(copy, target="e2e"))
    before = read_state(finished / "stage-0" / STATE)[2]
    for begun in ("stage 1 0", "arm e2e 0"):
        assert same({name: before[name] for name in started[begun]}, started[begun]), "all that stage 0 ended with"
    state = read_state(finished / "stage-2" / STATE)[2]
    assert {int(state[name]) for name in state if name.startswith("optim/heads.") and name.endswith("/step")} == {24}


def test_a_stage_that_was_stopped_goes_on_to_the_same_bits(copy: Path, tmp_path: Path) -> None:
    runner.run_stage(job(copy, ANEW, target=1))
    root = tmp_path / "stopped"
    with pytest.raises(Interrupted, match="stage 1"):
        runner.run_stage(job(root, ANEW, target=1, stop=StopAfter(12)))
    runner.run_stage(job(root, ANEW, target=1))
    assert same(weights(copy, "stage-1"), weights(root, "stage-1"))
    assert same(read_state(copy / "stage-1" / STATE)[2], read_state(root / "stage-1" / STATE)[2])
