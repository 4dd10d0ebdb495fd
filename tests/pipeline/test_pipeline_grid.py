"""Which images a study may see, how its table calls those that it was evaluated on, and what its rows share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cache.manifest import atomic_write
from pipeline.__main__ import main
from pipeline.config import ConfigError
from pipeline.decide import Wanted
from pipeline.grid import read_study
from pipeline.layout import RunPaths
from pipeline.pool import publish
from pipeline.reading import parse, to_toml
from pipeline.recipes import recipe
from pipeline.speedup import cache_cost
from pipeline.studies import STUDIES, Study, row
from pipeline.study_table import facts
from tests.pipeline.toy import TOY, record, toy


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--data-val", "val.tar"], "DATA_VAL = val.tar; leave it out"),
        (["--set", "data.val_source=val.tar"], "data.val_source = val.tar; leave it out"),
        (["--config", "{config}"], "data.val_source = val.tar; leave it out"),
        (["--data", "sample"], "the evaluation images of data.source = sample; name other images with DATA"),
        (["--set", "data.source=sample"], "the evaluation images of data.source = sample; name other images with DATA"),
    ],
)
def test_a_study_that_chooses_sees_no_evaluation_images(tmp_path: Path, words: list[str], what: str) -> None:
    (tmp_path / "config.toml").write_text(to_toml(parse({"data.val_source": "val.tar"}, recipe("sample"))))
    words = [word.format(config=tmp_path / "config.toml") for word in words]
    with pytest.raises(ConfigError) as found:
        read_study(["plans", "--run", str(tmp_path), *words])
    assert str(found.value).startswith(f"study plans chooses settings, so it may not see {what}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "sample, evaluated on the sample's own evaluation images"),
        (["--data", "images"], "images, evaluated on a tenth that is held back"),
        (["--data", "images", "--data-val", "far/val.tar"], "images, evaluated on val.tar"),
        (["--set", "data.val_source=far/val.tar"], "sample, evaluated on far/val.tar"),
    ],
)
def test_the_table_says_what_it_was_evaluated_on(tmp_path: Path, words: list[str], told: str) -> None:
    assert f"- data: {told}" in facts(read_study(["seeds", "--run", str(tmp_path), *words]))


def test_the_table_s_command_names_the_recipe(tmp_path: Path) -> None:
    told = facts(read_study(["seeds", "--run", str(tmp_path), "--config", "cifar10", "--set", "data.source=sample"]))
    assert told[0].startswith('- command: `make study NAME=seeds CONFIG=cifar10 SET="data.source=sample"`')


def test_rows_that_are_fine_tuned_behind_one_cache_build_it_once_and_both_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = TOY | {"schedule.cuts": [0, 3], "schedule.epochs": [1, 1], "finetune.freeze": 2, "finetune.views": 1}
    common |= {"finetune.epochs": 1, "finetune.batch_size": 16}
    rows = {"slow": row("finetune", finetune__lr=1e-4), "fast": row("finetune", finetune__lr=1e-3)}
    monkeypatch.setitem(STUDIES, "two", lambda: Study("q", rows, "slow", common, seeds=(0,)))
    assert main(["study", "two", "--run", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert told.count("cache finetune: built in") == 1
    slow, fast = (record(tmp_path / f"two/{name}-seed-0", "finetune") for name in rows)
    assert slow["cache_seconds"] > 0 and slow["cache_seconds_elsewhere"] == 0
    assert fast["cache_seconds"] == 0 and fast["cache_seconds_elsewhere"] == pytest.approx(slow["cache_seconds"])
    assert cache_cost(fast) == pytest.approx(cache_cost(slow)) and not list((tmp_path / "caches").glob("cut-*"))


def test_a_part_of_another_machine_is_not_filed_under_this_one_s(copy: Path, tmp_path: Path) -> None:
    """Its seconds would be taken for those of today's threads, its scores for those of today's images."""
    changes: list[dict[str, Any]] = [{}, {"machine": {"threads": 7}}, {"machine": {"ranks": 2}}]
    changes += [{"scored": {"eval.val_limit": 7}}, {"machine": None}]
    file = copy / "stage-1/stage.json"
    whole = json.loads(file.read_text())
    found = []
    for number, change in enumerate(changes):
        changed = {key: value and whole[key] | value for key, value in change.items()}
        atomic_write(file, json.dumps(whole | changed).encode())
        places = publish(Wanted(toy(), RunPaths(copy)), tmp_path / f"pool-{number}")
        assert {"stage-0", "stage-2", "e2e", "freeze"} <= set(places)
        found.append("stage-1" in places)
    assert found == [True, False, True, False, False]
