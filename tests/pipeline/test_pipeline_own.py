"""Whose settings a call goes by: what works on a run as it lies takes the run's own, and only what trains, builds or
takes over something writes config.toml. Scores of other images or of another model are never told as the run's."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

from pipeline import __main__ as cli
from pipeline import course, runner, speedup
from pipeline.comparable import ways_unlike
from pipeline.config import ConfigError
from pipeline.decide import Wanted, judge_all
from pipeline.layout import RunPaths
from pipeline.pool import part_key
from pipeline.reading import read_toml, to_toml
from pipeline.recipes import recipe
from pipeline.report import render
from pipeline.story import read_story
from tests.pipeline.toy import job, record, toy

OWN = ["bench", "equivalence", "export", "gc", "probe", "repair", "report", "speedup", "status", "verify"]
WORDS = {"stage": ["1"], "cache": ["1"], "arm": ["e2e"]}


def lines(err: str) -> list[str]:
    """What went wrong, as it was told; a traceback has more lines than one."""
    return err.splitlines()


@pytest.fixture
def lying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that was trained with the toy's settings and a seed of its own."""
    monkeypatch.chdir(tmp_path)
    root = Path("runs/mine")
    root.mkdir(parents=True)
    (root / "config.toml").write_text(to_toml(toy(**{"seed": 3, "cache.root": "elsewhere"})))
    return root


@pytest.mark.parametrize("name", [name for name, verb in cli.VERBS.items() if not verb.reads])
def test_what_works_on_a_run_takes_its_settings_and_what_trains_takes_the_recipe(name: str, lying: Path) -> None:
    had, train = read_toml(lying / "config.toml"), recipe("sample").train
    words = WORDS.get(name, [])
    found = cli.read_job(name, [*words, "--run", str(lying)])
    kept = replace(train, **{key: getattr(had.train, key) for key in ("device", "precision", "threads")})
    assert found.config == (had if name in OWN else replace(recipe("sample"), train=kept))
    assert found.paths == RunPaths(lying, Path("elsewhere") if name in OWN else None)
    over = cli.read_job(name, [*words, "--run", str(lying), "--data", "a", "--set", "seed=5", "--cache-root", "b"])
    assert (over.config.seed, over.config.data.source, over.paths.caches) == (5, "a", Path("b"))
    given = cli.read_job(name, [*words, "--run", str(lying), "--config", "localmim"])
    assert given.config.heads == recipe("localmim").heads, "both are given: the user means what the file says"


@pytest.mark.parametrize("name", ["probe", "explain"])
def test_a_config_without_a_run_names_the_run(name: str, lying: Path) -> None:
    Path("mine.toml").write_text(to_toml(toy(seed=8)))
    found = cli.read_job(name, ["--config", "mine.toml"])
    assert (found.paths.root, found.config.seed) == (lying, 3 if name in OWN else 8)
    shutil.rmtree(lying)
    assert cli.read_job(name, ["--config", "mine.toml"]).config.seed == 8, "there is no run yet"
    assert cli.read_job(name, []).config.seed == recipe("sample").seed


@pytest.mark.parametrize("name", ["probe", "explain", "stage"])
def test_a_run_s_own_config_names_that_very_run_wherever_it_lies(name: str, lying: Path) -> None:
    there = Path("runs/studies/plans/e2e-seed-3")
    shutil.copytree(lying, there)
    ask = [*WORDS.get(name, []), "--config", str(there / "config.toml")]
    assert cli.read_job(name, ask).paths.root == Path("runs/e2e-seed-3"), "settings in a folder are no run yet"
    (there / "events.jsonl").touch()
    found = cli.read_job(name, ask)
    assert (found.paths.root, found.config.seed) == (there, 3)


def test_probe_scores_the_images_and_the_model_of_the_run(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--run", str(copy)]) == 0, capsys.readouterr().err
    found = json.loads((copy / "probe.json").read_text())
    assert list(found) == ["arm e2e", "arm freeze", "stage 0", "stage 1", "stage 2"]
    for name, folder in (("stage 0", "stage-0"), ("stage 2", "stage-2"), ("arm e2e", "arms/e2e")):
        part = record(copy, folder)
        scores = {key: one["top1"] for key, one in found[name]["probes"].items()}
        assert (scores["knn"], scores["logistic"]) == (part["knn_top1"], part["linear_top1"])
        assert found[name]["scored"] == part["scored"] | {"data": part["inputs"]["data"]}


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


@pytest.mark.parametrize("verb", ["speedup", "export", "gc", "repair", "probe", "equivalence"])
def test_what_trains_nothing_leaves_the_settings_of_a_run(
    verb: str, copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Called with the settings of another run, then with none."""
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    had = {name: (copy / name).read_bytes() for name in ("config.toml", "speedup.json")}
    caches = sorted((copy / "cache").glob("cut-*"))
    status = cli.main([verb, "--config", "sample", "--run", str(copy)])
    assert status == (0 if verb == "repair" else 2), "of the sample there is no cache here"
    assert len(lines(capsys.readouterr().err)) == (0 if verb == "repair" else 1)
    assert {name: (copy / name).read_bytes() for name in had} == had
    (copy / "config.toml").write_text("# as it was left\n" + had["config.toml"].decode())
    assert cli.main([verb, "--run", str(copy), "--yes"]) == 0, capsys.readouterr().err
    assert (copy / "config.toml").read_text() == "# as it was left\n" + had["config.toml"].decode()
    assert sorted((copy / "cache").glob("cut-*")) == caches and len(caches) == 2


def test_gc_dooms_no_cache_of_a_run_that_is_given_alone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = sorted((copy / "cache").glob("cut-*"))
    stray = shutil.copytree(kept[0], copy / "cache" / "cut-9-00000000")
    assert cli.main(["gc", "--yes", "--run", str(copy)]) == 0
    assert sorted((copy / "cache").glob("cut-*")) == kept and not stray.exists()
    told = capsys.readouterr().out
    assert [line for line in told.splitlines() if "not needed" in line] == [f"not needed: {stray}"]


def test_report_and_status_tell_a_run_by_its_own_settings(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(finished, tmp_path / "toy")
    changed = toy(**{"train.min_lr": 1e-5, "schedule.cuts": [0, 3], "schedule.epochs": [1, 1]})
    runner.run_all(job(root, changed))
    capsys.readouterr()
    assert cli.main(["report", "--run", str(root)]) == cli.main(["status", "--run", str(root)]) == 0
    assert read_toml(root / "config.toml") == changed
    story = read_story(RunPaths(root))
    assert [verdict.what for verdict in story.verdicts if verdict.state == "stale"] == []
    assert cli.main(["speedup", "--run", str(root)]) == 0


def test_config_is_written_once_something_is_trained_or_built(copy: Path) -> None:
    had = (copy / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match=r"lower cache\.views"):
        runner.run_stage(job(copy, toy(**{"cache.views": 10_000_000}), target=2))
    runner.run_stage(job(copy, toy(**{"cache.views": 3}), target=0))
    assert (copy / "config.toml").read_bytes() == had, "refused; and nothing to do, for stage 0 reads no cache"
    runner.run_cache(job(copy, toy(**{"cache.views": 3}), target=1))
    assert read_toml(copy / "config.toml").cache.views == 3
    runner.run_all(job(copy))
    assert (copy / "config.toml").read_bytes() == had, "all stages and arms are as these settings ask for"


def test_scores_of_other_images_than_the_settings_ask_for_are_said_to_be(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is trained again for how it is scored, so all parts stay current."""
    runner.run_all(job(copy, toy(**{"eval.val_limit": 30})))
    out = " ".join(capsys.readouterr().out.split())
    how = "eval.val_limit: 40 -> 30"
    assert out.count(": current (fingerprint") == 5 == out.count(f"scored otherwise than asked: {how}")
    told = f"are not those that the settings ask for: {how} (stage 0, stage 1, stage 2, arm e2e, arm freeze)"
    assert told in unescape(render(read_story(RunPaths(copy)))) and f"scores {told}" in out, "also where nothing ran"
    assert record(copy, "stage-2")["curve"][-1]["probe_images"] == 40
    speedup.run_speedup(job(copy, toy(**{"eval.val_limit": 30})))
    assert f"scores {told}" in " ".join(capsys.readouterr().out.split())
    runner.run_all(job(copy, toy()))
    assert "not those that" not in capsys.readouterr().out + render(read_story(RunPaths(copy)))


def test_scores_on_rows_that_an_earlier_version_took_otherwise_do_not_compare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its records say nothing of rows; nor do those of lists whose rows are the same as then."""
    before = Wanted(toy(), RunPaths(tmp_path)).scored
    assert "eval.rows" not in before
    monkeypatch.setattr(course, "by_class", lambda labels, limit: True)
    now = Wanted(toy(), RunPaths(tmp_path)).scored
    assert ways_unlike([before, now]) == "eval.rows alike or in proportion to classes"


def test_a_run_that_an_earlier_version_scored_on_other_rows_is_told(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Wanted(toy(), RunPaths(copy))
    key = part_key(run, {}, cached=False)
    assert not any(verdict.scored for verdict in judge_all(run))
    monkeypatch.setattr(course, "by_class", lambda labels, limit: True)
    run = Wanted(toy(), RunPaths(copy))
    told = {verdict.what: verdict.scored for verdict in judge_all(run)}
    assert told["stage 0"] == told["arm e2e"] == "eval.rows: evenly spread -> in proportion to classes"
    assert part_key(run, {}, cached=False) != key, "nor is such a part handed on in a study"
