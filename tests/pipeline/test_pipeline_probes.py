"""The probes that `probe` prints and writes, and what `check` refuses of the settings of probes and fine-tuning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pipeline import runner
from pipeline.checks import check
from pipeline.config import ConfigError
from tests.pipeline.toy import job, record, toy

FROZEN = {"finetune.batch_size": 16, "finetune.lr": 3e-3, "finetune.heads": [3, 4], "finetune.freeze": 2}
PROBES = {
    "eval.probes": ["knn", "logistic", "sgd", "lars", "attentive"],
    "eval.probe_epochs": 3,
    "eval.attentive_epochs": 2,
    "eval.probe_batch": 16,
}


def test_probe_prints_and_writes_every_probe_with_the_setting_that_won(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(finished, tmp_path / "toy")
    (root / "probe.json").unlink(missing_ok=True)  # another test may have probed the run that all share
    runner.run_probe(job(root, toy(**PROBES), target=2))
    out = capsys.readouterr().out
    written = json.loads((root / "probe.json").read_text())
    assert list(written) == ["stage 2"]
    found, stage = written["stage 2"], record(root, "stage-2")
    assert found["weights"] == stage["weights"] and (found["images"], found["train_images"]) == (40, 40)
    assert list(found["probes"]) == PROBES["eval.probes"]
    assert (found["probes"]["knn"]["top1"], found["probes"]["logistic"]["top1"]) == (
        stage["knn_top1"],
        stage["linear_top1"],
    )
    for name in ("sgd", "lars", "attentive"):
        one = found["probes"][name]
        assert f"{one['top1']:.3f} (rate {one['setting']['rate']:g})" in out
        held = one["held_back_top1"]
        assert held[f"{one['setting']['rate']:g}"] == max(held.values())
    runner.run_probe(job(root, toy(), target="e2e"))
    assert list(json.loads((root / "probe.json").read_text())) == ["arm e2e", "stage 2"], "scores of others stay"
    shutil.copy(root / "stage-1" / "model.safetensors", root / "stage-2" / "model.safetensors")
    runner.run_probe(job(root, toy(), target=0))
    written = json.loads((root / "probe.json").read_text())
    assert list(written) == ["arm e2e", "stage 0"], "those of other weights do not"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"finetune.batch_size": 15}, ["finetune.batch_size = 15 is odd", "finetune.mixup=0"]),
        ({"finetune.accumulate": 3}, ["finetune.batch_size = 16", "finetune.accumulate = 3"]),
        ({"finetune.min_lr": 1.0}, ["finetune.min_lr = 1.0", "finetune.lr = 0.003"]),
        ({"finetune.heads": [4, 3]}, ["finetune.heads = [4, 3] does not rise"]),
        ({"finetune.heads": [1, 3]}, ["finetune.heads = [1, 3] does not rise from finetune.freeze = 2"]),
        ({"finetune.heads": [3, 5]}, ["finetune.heads = [3, 5] has more than the 4 blocks"]),
        ({"finetune.freeze": 5, "finetune.heads": [5]}, ["finetune.freeze = 5 is more than the 4 blocks"]),
        ({"finetune.rand_augment": 11}, ["finetune.rand_augment = 11.0 is outside [0, 10]"]),
        ({"finetune.layer_decay": 0}, ["finetune.layer_decay = 0.0 is outside (0, 1]"]),
        ({"eval.probe_rates": [0.1, 0.1]}, ["eval.probe_rates = [0.1, 0.1] is no list of different rates"]),
        ({"eval.lars_rates": [-1.0]}, ["eval.lars_rates = [-1.0]"]),
        ({"eval.attentive_rates": [0.0]}, ["eval.attentive_rates = [0.0]"]),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(changes: dict[str, object], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(toy(**(FROZEN | changes)))
    assert [part for part in parts if part not in str(caught.value)] == [], caught.value
    assert "\n" not in str(caught.value)
