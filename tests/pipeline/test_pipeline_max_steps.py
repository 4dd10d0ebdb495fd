"""A run whose stages `train.max_steps` ends early: one clock, the epochs that were trained, in records, curves, kept
encoders and the comparison; the order that rows are read in goes by the plan's epochs all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline import runner
from pipeline.charts import stretches
from pipeline.config import PipelineConfig
from pipeline.decide import Wanted, judge_all
from pipeline.layout import RunPaths
from tests.pipeline.toy import job, record, toy

STEPS = 4
"""Of six an epoch: three stages planned for two epochs each train 12 steps, which are two epochs."""


def short() -> PipelineConfig:
    how: dict[str, object] = {
        "schedule.epochs": [2, 2, 2],
        "train.max_steps": STEPS,
        "train.save_epochs": [1, 2],
        "eval.every": 1,
        "eval.train_limit": 20,
        "eval.val_limit": 20,
        "finetune.epochs": 1,
        "finetune.batch_size": 16,
        "finetune.max_steps": 3,
    }
    return toy(**how)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("short") / "toy"
    runner.run_all(job(root, short()))
    runner.run_finetune(job(root, short()))
    return root


def test_records_curves_and_the_comparison_count_the_epochs_that_were_trained(run: Path) -> None:
    parts = ("stage-0", "stage-1", "stage-2", "arms/e2e", "arms/freeze", "finetune")
    trained = {name: record(run, name)["epochs"] for name in parts}
    assert trained == pytest.approx(
        {**dict.fromkeys(parts[:3], 4 / 6), **dict.fromkeys(parts[3:5], 8 / 6), "finetune": 3 / 6}
    )
    found = json.loads((run / "speedup.json").read_text())
    for arm in found["arms"].values():
        assert (arm["epochs"], arm["images"]) == (pytest.approx(2.0), 2 * 96)
        assert [point["epoch"] for point in arm["curve"]] == pytest.approx([4 / 6, 1.0, 8 / 6, 2.0])
    assert found["early_stop"]["epoch"] <= 2.0 and (found["break_even_epoch"] or 0.0) <= 2.0
    timeline = stretches([record(run, f"stage-{stage}") for stage in range(3)])
    assert [(part.start, part.epochs) for part in timeline] == [pytest.approx((k * 4 / 6, 4 / 6)) for k in range(3)]


def test_epochs_to_keep_are_epochs_trained(run: Path) -> None:
    """The first ends two steps into stage 1, where the plan's clock stands at 2 1/3, the second with the run."""
    files = {str(path.relative_to(run)) for path in run.rglob("epoch-*.safetensors")}
    assert files == {
        *(f"{name}/epoch-1.safetensors" for name in ("stage-1", "arms/e2e", "arms/freeze")),
        *(f"{name}/epoch-2.safetensors" for name in ("stage-2", "arms/e2e", "arms/freeze")),
    }
    verdicts = judge_all(Wanted(short(), RunPaths(run)))
    assert all(verdict.current or verdict.reason.startswith("not needed") for verdict in verdicts)


def test_rows_are_read_in_the_order_of_the_plan_s_epochs(run: Path) -> None:
    for stage in range(3):
        (noted,) = record(run, f"stage-{stage}")["read"]
        assert (noted["epoch"], noted["first"], noted["steps"]) == (2 * stage, 0, STEPS)
