"""Studies: the grid, what its runs share, stopping and going on, hours, failures, and the numbers that are written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import runner
from pipeline import study as engine
from pipeline.__main__ import main
from pipeline.decide import Wanted
from pipeline.grid import Request, read_study
from pipeline.job import Interrupted
from pipeline.layout import RunPaths
from pipeline.pool import made_so, part_key
from pipeline.studies import STUDIES, Study, row, study
from stages.schedule import plan_stages
from tests.pipeline.toy import SMALL, StopAfter, ask, job, same, toy, weights
from tests.stages.conftest import encoded, in_folder


def results(root: Path) -> list[dict[str, str]]:
    with (root / "tiny" / "results.csv").open() as file:
        return list(csv.DictReader(file))


# --- the grid -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_a_grid_of_runs_that_can_be_planned(name: str, tmp_path: Path) -> None:
    asked, request = study(name), read_study([name, "--run", str(tmp_path)])
    assert "Data:" in (STUDIES[name].__doc__ or "") and "ompared" in (STUDIES[name].__doc__ or "")
    against = {variant.against or asked.control for variant in asked.variants.values()}
    assert against <= set(asked.variants) and len(asked.seeds) in (1, 3)
    assert [run.seed for run in request.runs] == sorted(run.seed for run in request.runs)
    measured = [(variant, run.seed) for run in request.runs for variant in run.measures]
    assert sorted(measured) == sorted((variant, seed) for variant in asked.variants for seed in asked.seeds)
    for run in request.runs[: len(request.runs) // len(asked.seeds)]:
        depth, warmup = 12, run.config.train.warmup_epochs
        stages = plan_stages(run.config.schedule, depth, 140, warmup, None, ())
        assert all(stage.epochs > 0 for stage in stages) and stages[-1].cut > 0


def test_equal_settings_are_one_run_and_settings_go_from_study_to_set_to_variant(studies: None, tmp_path: Path) -> None:
    request = ask(tmp_path, "--set", "train.lr=0.5", "--seeds", "4", "7")
    assert [(run.name, run.seed, run.measures) for run in request.runs] == [
        *(("e2e", 4, {"e2e": "e2e", "two": "cached"}), ("one", 4, {"one": "cached"})),
        *(("e2e", 7, {"e2e": "e2e", "two": "cached"}), ("one", 7, {"one": "cached"})),
    ]
    assert [run.config.cache.views for run in request.runs] == [2, 1, 2, 1]
    assert {run.config.train.lr for run in request.runs} == {0.5}
    assert request.runs[3].paths.root == tmp_path / "tiny" / "one-seed-7"
    assert {run.config.cache.root for run in request.runs} == {str(tmp_path / "caches")}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["tny"], "no study tny; did you mean tiny"),
        (["tiny", "--set", "cache.views=4"], "study tiny sets cache.views itself"),
        (["tiny", "--set", "seed=4"], "study tiny sets seed itself"),
        (["tiny", "--set", "mask.ratio=2"], "study tiny, variant e2e: mask.ratio = 2.0 is outside"),
        (["tiny", "--only", "e2e", "ones"], "study tiny has no variant ones; did you mean one?"),
        (["tiny", "--hours", "-1"], "--hours = -1 is outside [0, inf)"),
        (["plans", "--data-val", "val.tar"], "study plans chooses settings, so it may not see DATA_VAL = val.tar"),
    ],
)
def test_a_wrong_request_is_one_line(
    studies: None, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", *words]) == 2
    out, err = capsys.readouterr()
    assert told in err and err.count("\n") == 1 and not out


# --- the runs -------------------------------------------------------------------------------------------------------


def test_runs_share_what_is_equal_stop_go_on_and_lose_nothing(
    studies: None, trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(10**6))
    request = ask(tmp_path, "--hours", str(5 / 3600), "--seeds", "0", "1")
    engine.carry_out(request, now=lambda: next(clock))  # a second passes whenever the clock is read: at every step
    out = capsys.readouterr().out
    assert "hours are up: 0 of 6 rows are done; the same command goes on from there" in out
    assert trained == ["e2e-seed-0/stage-0"]
    assert [row["state"] for row in results(tmp_path)] == [*["unfinished", "missing"] * 2, "missing", "missing"]

    trained.clear()
    assert main(["study", "tiny", "--run", str(tmp_path), "--seeds", "0", "1"]) == 0
    assert trained == [
        *("e2e-seed-0/stage-0", "e2e-seed-0/stage-1", "e2e-seed-0/e2e", "one-seed-0/stage-1"),
        *("e2e-seed-1/stage-0", "e2e-seed-1/stage-1", "e2e-seed-1/e2e", "one-seed-1/stage-1"),
    ], "stage 0 is trained once a seed, and went on where it stopped"
    assert "stage-0: taken over" in capsys.readouterr().out
    numbers_are_those_of_the_records(tmp_path)
    assert not list((tmp_path / "caches").glob("cut-*")), "the caches of finished runs are gone"
    one, e2e = (tmp_path / "tiny" / f"{name}-seed-0" for name in ("one", "e2e"))
    assert (one / "stage-0/model.safetensors").samefile(e2e / "stage-0/model.safetensors")
    steps = [json.loads(line) for line in (one / "events.jsonl").read_text().splitlines()]
    told = {event.get("stage", event.get("arm")) for event in steps if "loss" in event}
    assert told == {0, 1, "e2e"}, "the log of what was taken came with it"

    runner.run_stage(job(tmp_path / "whole", request.runs[1].config, target=1))
    assert same(weights(tmp_path / "whole", "stage-1"), weights(one, "stage-1")), "stopping and sharing changed no bit"
    trained.clear()
    assert main(["study", "tiny", "--run", str(tmp_path), "--seeds", "0"]) == 0 and trained == []
    capsys.readouterr()
    assert main(["study", "tiny", "--run", str(tmp_path), "--seeds", "0", "--set", "eval.knn_k=5"]) == 2
    assert "e2e-seed-0 was scored with eval.knn_k = 20, this call has 5" in capsys.readouterr().err


def test_some_rows_first_then_the_rest(
    studies: None, trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["study", "tiny", "--run", str(tmp_path), "--seeds", "0"]
    assert main([*words, "--only", "one", "e2e"]) == 0
    assert trained == ["e2e-seed-0/stage-0", "e2e-seed-0/e2e", "one-seed-0/stage-1"], "nothing of the cached row `two`"
    out, table = capsys.readouterr().out, (tmp_path / "tiny" / "table.md").read_text()
    assert "run 1 of 2: e2e, seed 0" in out and "run 2 of 2: one, seed 0" in out
    assert "- two, seed 0: unfinished: left out by --only" in table and "- one, seed 0" not in table
    assert [row["state"] for row in results(tmp_path)] == ["done", "unfinished", "done"]
    assert main([*words, "--only", "two", "--list"]) == 0
    out = capsys.readouterr().out
    assert "1 of 1 runs are still to do" in out and "one" not in [line.split()[0] for line in out.splitlines()]
    trained.clear()
    assert main(words) == 0 and trained == ["e2e-seed-0/stage-1"]
    assert [row["state"] for row in results(tmp_path)] == ["done"] * 3
    assert "## Not there" not in (tmp_path / "tiny" / "table.md").read_text()


def numbers_are_those_of_the_records(root: Path) -> None:
    found = {(row["variant"], int(row["seed"])): row for row in results(root)}
    assert {row["state"] for row in found.values()} == {"done"}
    for seed in (0, 1):
        parts = {
            name: [json.loads((root / f"tiny/{run}-seed-{seed}/{part}/stage.json").read_text()) for part in files]
            for name, run, files in (
                ("e2e", "e2e", ("stage-0", "arms/e2e")),
                ("two", "e2e", ("stage-0", "stage-1")),
                ("one", "one", ("stage-0", "stage-1")),
            )
        }
        for name, (first, last) in parts.items():
            row = found[name, seed]
            cache = last["cache_seconds"] + last.get("cache_seconds_elsewhere", 0.0)
            assert float(row["total_seconds"]) == pytest.approx(first["train_seconds"] + last["train_seconds"] + cache)
            assert float(row["knn_top1"]) == last["knn_top1"] and float(row["linear_top1"]) == last["linear_top1"]
        assert found["e2e", seed]["knn_top1_e2e_stopped"] == "" != found["two", seed]["knn_top1_e2e_stopped"]
        assert int(found["two", seed]["cache_bytes"]) > 1.9 * int(found["one", seed]["cache_bytes"]) > 0
    with (root / "tiny" / "table.csv").open() as file:
        table = {row["variant"]: row for row in csv.DictReader(file)}
    gains = [float(found["one", seed]["knn_top1"]) - float(found["e2e", seed]["knn_top1"]) for seed in (0, 1)]
    assert float(table["one"]["knn_top1_less_control"]) == pytest.approx(sum(gains) / 2)
    # two values: t of one degree of freedom at 97.5 % is 12.706, their standard error half their distance
    half = 12.706 * abs(gains[0] - gains[1]) / 2
    assert float(table["one"]["knn_top1_less_control_half"]) == pytest.approx(half, rel=1e-4, abs=1e-12)
    text = (root / "tiny" / "table.md").read_text()
    assert "2 seeds: no difference is claimed" in text and "make study NAME=tiny" in text
    assert (root / "tiny" / "study.png").stat().st_size > 10_000


def test_a_run_that_fails_is_told_and_loses_no_other(
    monkeypatch: pytest.MonkeyPatch, trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {"bad": row(train__lr=1e30, train__warmup_epochs=0.0), "good": row(), "tuned": row("finetune")}
    tuned = {"finetune.epochs": 1, "finetune.batch_size": 16, "finetune.freeze": 2, "finetune.views": 1}
    monkeypatch.setitem(STUDIES, "tiny", lambda: Study("Which fails?", bad, "good", SMALL | tuned, seeds=(0,)))
    assert main(["study", "tiny", "--run", str(tmp_path)]) == 1
    _, err = capsys.readouterr()
    assert "1 of 2 runs failed, first bad, seed 0: RunFailed" in err and "lower train.lr" in err
    record = json.loads((tmp_path / "tiny/good-seed-0/finetune/stage.json").read_text())
    (last,) = (row for row in results(tmp_path) if row["variant"] == "tuned")
    assert (float(last["top1"]), last["knn_top1"]) == (record["top1"], "")
    assert float(last["total_seconds"]) == pytest.approx(record["train_seconds"] + record["cache_seconds"])
    states = {row["variant"]: (row["state"], row["why"]) for row in results(tmp_path)}
    assert states["good"] == ("done", "") and states["bad"][0] == "failed" and "loss=nan" in states["bad"][1]
    assert "- bad, seed 0: failed: RunFailed" in (tmp_path / "tiny" / "table.md").read_text()


def test_another_study_takes_what_is_there_and_a_run_of_three_arms_is_compared(
    monkeypatch: pytest.MonkeyPatch, trained: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {"e2e": row("e2e"), "cached": row()}
    monkeypatch.setitem(STUDIES, "tiny", lambda: Study("Two arms?", arms, "e2e", SMALL, seeds=(0,)))
    monkeypatch.setitem(STUDIES, "other", lambda: Study("Three?", arms | {"freeze": row("freeze")}, "e2e", SMALL))
    assert main(["study", "tiny", "--run", str(tmp_path)]) == 0
    assert not (tmp_path / "tiny/e2e-seed-0/speedup.json").exists()
    trained.clear()
    assert main(["study", "other", "--run", str(tmp_path), "--seeds", "0"]) == 0
    run = tmp_path / "other/e2e-seed-0"
    assert trained == ["e2e-seed-0/freeze"], "the rest is taken; caches are built again to be timed"
    found = json.loads((run / "speedup.json").read_text())
    record = json.loads((tmp_path / "tiny/e2e-seed-0/stage-1/stage.json").read_text())
    assert found["arms"]["cached"]["cache_seconds"] == pytest.approx(record["cache_seconds"])
    assert found["seeds"]["seeds"] == [0] and found["seeds"]["cached_less_e2e"]["knn_top1"]["claimed"] is False
    html = (run / "report.html").read_text()
    assert "one seed" in html and "no difference is claimed" in html
    assert not list((tmp_path / "caches").glob("cut-*"))
    capsys.readouterr()
    assert main(["study", "other", "--run", str(tmp_path), "--seeds", "0", "--list"]) == 0
    out = capsys.readouterr().out
    assert "0 of 1 runs are still to do" in out and "e2e, cached, freeze" in out and "1+2" in out
    assert main(["study", "--run", str(tmp_path)]) == 0
    assert any(line.split()[:4] == ["other", "3", "3", "1"] for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize(
    ("change", "first", "later"),
    [
        ({"cache.root": "elsewhere", "cache.keep": "needed", "finetune.epochs": 9}, True, True),
        ({"cache.codec": "int8"}, True, False),
        ({"cache.shard_rows": 20}, True, False),
        ({"cluster.workers": 2}, True, False),
        ({"mask.groups": 2}, True, False),
        ({"train.lr": 0.5}, False, False),
        ({"train.threads": 2}, False, False),
        ({"model.attention": "fused"}, False, False),
        ({"train.loader_threads": 1}, False, False),
        ({"eval.knn_k": 5}, False, False),
        ({"data.val_source": "val"}, False, False),
        ({"seed": 1}, False, False),
    ],
)
def test_a_part_is_shared_only_where_numbers_seconds_and_scores_would_be_equal(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], first: bool, later: bool
) -> None:
    monkeypatch.chdir(in_folder(tmp_path, {"val/v.png": encoded()}))

    def keys(config: Any) -> list[str]:
        wanted = Wanted(config, RunPaths(finished))
        return [part_key(wanted, wanted.stage_inputs(stage), cached=stage > 0) for stage in (0, 2)]

    same_keys = [one == other for one, other in zip(keys(toy()), keys(toy(**change)), strict=True)]
    assert same_keys == [first, later]
    here = keys(toy())
    monkeypatch.setattr("pipeline.pool.described", lambda config: {"device": "cpu (another)"})
    assert not set(here) & set(keys(toy())), "nor with another machine"


def test_a_part_that_ranks_have_trained_is_shared_and_one_of_another_kernel_is_not(copy: Path) -> None:
    wanted = Wanted(toy(), RunPaths(copy))
    paths = wanted.paths.stage(0)
    plain = json.loads(paths.json.read_text())
    for more, shared in (({}, True), ({"ranks": 2, "parallel": "fsdp"}, True), ({"attention": "fused"}, False)):
        paths.json.write_text(json.dumps(plain | {"machine": plain["machine"] | more}))
        assert made_so(wanted, paths) is shared


def test_ctrl_c_saves_writes_the_table_and_ends_with_130(studies: None, tmp_path: Path) -> None:
    stop: Any = StopAfter(6)
    flags = ask(tmp_path, "--seeds", "0")
    with pytest.raises(Interrupted, match=r"0 of 3 rows are done"):
        engine.carry_out(Request(flags.flags, flags.study, flags.runs, stop))
    assert [row["state"] for row in results(tmp_path)] == ["unfinished", "unfinished", "missing"]
