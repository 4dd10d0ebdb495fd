"""Scores of other images or of another model are never told as the run's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import __main__ as cli
from pipeline import runner
from pipeline.config import ConfigError
from pipeline.layout import RunPaths
from pipeline.report import render
from pipeline.story import read_story
from tests.pipeline.toy import job, record, toy


def lines(err: str) -> list[str]:
    """What went wrong, as it was told; a traceback has more lines than one."""
    return err.splitlines()


@pytest.mark.parametrize("words", [["--config", "sample"], ["2", "--set", "model.width=48"]])
def test_probe_of_another_model_is_one_line(words: list[str], copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", *words, "--run", str(copy)]) == 2
    (told,) = lines(capsys.readouterr().err)
    stage = "stage 2" if "2" in words else "stage 0"
    assert told.startswith(f"permafrost: {stage} in {copy} has another model than the settings: model.")
    assert "model.width: 32 -> " in told and f"`make probe RUN={copy}`" in told
    assert not (copy / "probe.json").exists()


def test_an_encoder_that_is_being_trained_again_has_no_scores(copy: Path) -> None:
    (copy / "stage-1/stage.json").write_text(json.dumps(record(copy, "stage-1") | {"status": "running"}))
    with pytest.raises(ConfigError, match="has no trained stage 1; run `make all` or `make stage-0` first"):
        runner.run_probe(job(copy, target=1))


def test_scores_of_other_images_are_none_of_the_runs(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    knn = toy(**{"eval.probes": ["knn"]})
    runner.run_probe(job(copy, knn, target=2))
    assert read_story(RunPaths(copy)).probe.keys() == {"stage 2"}
    capsys.readouterr()
    runner.run_probe(job(copy, replace(knn, data=replace(knn.data, limit=64)), target=1))
    assert "stage 1: other images than those of the run; its report leaves the scores out" in capsys.readouterr().out
    assert list(json.loads((copy / "probe.json").read_text())) == ["stage 1"], "one table is of the same images"
    story = read_story(RunPaths(copy))
    assert (story.probe, story.probe_unlike) == ({}, ["stage 1"])
    page = render(story)
    assert "Probes, top-1" not in page
    assert "The scores of stage 1 in probe.json are of other weights or images than the run&#39;s" in page
    runner.run_probe(job(copy, knn, target=1))
    stage = record(copy, "stage-1") | {"weights": "of a training that came later"}
    (copy / "stage-1/stage.json").write_text(json.dumps(stage))
    assert read_story(RunPaths(copy)).probe_unlike == ["stage 1"]
