"""The command line on several ranks: stages, arms and fine-tuning end where one process ends; who differs, dies or is
told to stop ends the call for all, with one line, and the next call goes on. Mostly without torchrun, whose start takes
seconds; once with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pipeline import runner, speedup
from pipeline.checks import check
from pipeline.claims import contrasts, headline
from pipeline.config import ConfigError
from pipeline.ranks import on_own_device, rank_here, refuse_what_ranks_cannot
from pipeline.reading import to_toml
from stages.checkpoint import read_state
from tests.pipeline.crewwork import call
from tests.pipeline.toy import job, record, toy, weights
from tests.ranks import on_ranks

REPOSITORY = Path(__file__).parents[2]


def words(out: Path, ranks: int) -> list[str]:
    return [(out / f"rank-{rank}").read_text() for rank in range(ranks)]


def complaints(said: list[str]) -> list[str]:
    """The lines that complain, of all ranks."""
    return re.findall("^permafrost: (.*)$", "\n".join(said), re.MULTILINE)


def asked(root: Path, *more: str) -> list[str]:
    return ["--config", str(root / "config.toml"), "--run", str(root), *(["--set", *more] if more else [])]


def assert_close(root: Path, other: Path, name: str) -> None:
    mine, theirs = weights(root, name), weights(other, name)
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        if not key.endswith("attn.qkv.bias"):  # see tests/stages/test_stages_team.py
            torch.testing.assert_close(mine[key], value, rtol=1e-4, atol=1e-5, msg=key)
    losses = [record(folder, name)["final_loss"] for folder in (root, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["stage 2", "arm e2e", "arm freeze"])
def test_two_ranks_do_what_one_does(verb: str, finished: Path, copy: Path, tmp_path: Path) -> None:
    name = verb.replace("stage ", "stage-").replace("arm ", "arms/")
    shutil.rmtree(copy / name)
    assert on_ranks(2, call, tmp_path, [*verb.split(), *asked(copy)], {}) == [0, 0]
    assert_close(copy, finished, name)
    made, had = record(copy, name), record(finished, name)
    assert made["fingerprint"] == had["fingerprint"] and made["parent"] == had["parent"], "ranks are no input"
    assert (made["machine"]["ranks"], made["images"]) == (2, had["images"])
    said = words(tmp_path, 2)
    assert f"{verb}: missing" in said[0] and not said[1]
    events = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    before = len((finished / "events.jsonl").read_text().splitlines())
    kinds = {"stage": 2} if "stage" in verb else {"arm": verb.split()[1]}
    assert all(kinds.items() <= event.items() for event in events[before:]) and len(events) > before
    assert sum("probe" in event for event in events[before:]) == len(made["curve"])


@pytest.mark.slow
def test_caches_are_built_by_the_first_rank_while_the_others_wait(finished: Path, copy: Path, tmp_path: Path) -> None:
    """From nothing but stage 0: two caches, two stages, in one call; the first cache is that of one process."""
    for name in ("stage-1", "stage-2", "arms", "cache"):
        shutil.rmtree(copy / name)
    assert on_ranks(2, call, tmp_path, ["stage", "2", *asked(copy)], {}) == [0, 0]
    assert record(copy, "stage-1")["cache"] == record(finished, "stage-1")["cache"]
    assert_close(copy, finished, "stage-1")
    assert_close(copy, finished, "stage-2")


@pytest.mark.slow
def test_two_ranks_fine_tune_as_one(finished: Path, tmp_path: Path) -> None:
    settings = {"finetune.epochs": 2, "finetune.batch_size": 16, "finetune.accumulate": 2, "finetune.drop_path": 0.5}
    roots = [shutil.copytree(finished, tmp_path / name) for name in ("one", "two")]
    config = toy(**settings, **{"finetune.freeze": 2, "finetune.heads": [3]})
    runner.run_finetune(job(roots[0], config))
    (roots[1] / "config.toml").write_text(to_toml(config))
    assert on_ranks(2, call, tmp_path, ["finetune", *asked(roots[1])], {}) == [0, 0]
    assert_close(roots[1], roots[0], "finetune")
    assert "from stage 2" in words(tmp_path, 2)[0] and not words(tmp_path, 2)[1]


def test_arms_that_were_not_trained_alike_are_told_apart(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads((finished / "speedup.json").read_text())
    assert [[one["ranks"] for one in arm["machines"]] for arm in found["arms"].values()] == [[1], [1], [1]]
    quiet = {arm: found["arms"][arm] | {"crowded_seconds": 0.0} for arm in found["arms"]}
    speedup.show(found | {"arms": quiet})
    assert "trained alike" not in capsys.readouterr().out
    for change, told in (({"ranks": 2}, "ranks 1 or 2"), ({"compile": "on"}, "compile auto or on")):
        parts = [record(finished, "stage-0"), record(finished, "arms/e2e")]
        parts[1]["machine"] |= change
        one = found | {"arms": quiet | {"e2e": speedup.arm_summary(parts)}}
        speedup.show(one)
        out = " ".join(capsys.readouterr().out.split())
        assert f"arms were not trained alike ({told}), so seconds do not compare" in out
        assert told in headline(one) and not contrasts(one) and contrasts(one, other="e2e")


def test_make_starts_ranks() -> None:
    torchrun = "torchrun --standalone --nproc-per-node 2 -m -- pipeline stage 1"
    for ranks, want in (["RANKS=2"], torchrun), ([], "python -m pipeline stage 1"):
        call = ["make", "-n", "stage-1", *ranks]
        shown = subprocess.run(call, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert re.search(rf"^\.venv/bin/{want} *$", shown.stdout, re.MULTILINE)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [None, 1])
def test_a_call_that_ranks_cannot_share_is_refused_once(late: int | None, copy: Path, tmp_path: Path) -> None:
    """Also where rank 0, which keeps what the ranks tell each other, is done before another has looked."""
    assert on_ranks(3, call, tmp_path, ["stage", "2", *asked(copy)], {}, None, late) == [2, 2, 2]
    (line,) = complaints(words(tmp_path, 3))
    assert line.startswith("train.batch_size = 16 does not divide among 3 ranks; use a multiple of 3")


@pytest.mark.parametrize(
    ("settings", "verb", "ranks", "why"),
    [
        ({"train.accumulate": 2}, "stage", 16, "train.accumulate = 2; use a multiple of 32"),
        ({"finetune.batch_size": 6}, "finetune", 2, "finetune.batch_size = 6 does not divide among 2 ranks in pairs"),
        ({"train.device": "cuda:1"}, "arm", 2, "train.device = cuda:1 is one GPU for 2 ranks; use train.device=cuda"),
        ({"train.parallel": "fsdp", "train.compile": "on"}, "all", 2, "train.compile = on with train.parallel = fsdp"),
    ],
)
def test_what_ranks_cannot_is_named(settings: dict[str, object], verb: str, ranks: int, why: str) -> None:
    config = toy(**settings)
    check(config)
    with pytest.raises(ConfigError, match=re.escape(why)):
        refuse_what_ranks_cannot(config, verb, ranks)


def test_ranks_that_divide_the_batches_are_not_refused() -> None:
    refuse_what_ranks_cannot(toy(**{"train.accumulate": 2, "finetune.batch_size": 8}), "finetune", 4)
    refuse_what_ranks_cannot(toy(**{"finetune.batch_size": 6}), "stage", 2)


def test_the_environment_tells_the_rank() -> None:
    every = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert (rank_here(every).rank, rank_here(every).ranks) == (1, 4)
    assert rank_here({"WORLD_SIZE": "4"}).ranks == 1, "a variable that something else left behind"
    assert on_own_device(toy(**{"train.device": "cuda"}), 3).train.device == "cuda:3"
    assert on_own_device(toy(), 3) == toy()


@pytest.mark.slow
def test_a_rank_with_other_settings_ends_the_call(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "stage-2")
    more = {1: ["--set", "train.lr=2e-3"]}
    assert on_ranks(2, call, tmp_path, ["stage", "2", *asked(copy)], more) == [2, 2]
    (line,) = complaints(words(tmp_path, 2))
    assert line.startswith("rank 1 would train another stage 2 than rank 0 (train.lr: 0.001 -> 0.002); start all ranks")


def test_a_verb_that_trains_nothing_is_the_first_rank_s(copy: Path, tmp_path: Path) -> None:
    assert on_ranks(2, call, tmp_path, ["explain", *asked(copy)], {}) == [0, 0]
    first, second = words(tmp_path, 2)
    assert "stage 2" in first and not second


# --- ranks that die or are told to stop -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_ends_the_call_and_the_next_goes_on(
    dies: int, finished: Path, copy: Path, tmp_path: Path
) -> None:
    shutil.rmtree(copy / "stage-2")
    often = ["--set", "train.save_every=1e-6"]
    found = on_ranks(2, call, tmp_path, ["stage", "2", *asked(copy), *often], {}, dies)
    assert found == [None if rank == dies else 1 for rank in range(2)]
    (line,) = complaints(words(tmp_path, 2))
    assert line.startswith("a rank has died without a word") and "the same command goes on from there" in line
    assert record(copy, "stage-2")["status"] == "running"
    assert read_state(copy / "stage-2" / "last" / "state.safetensors")[1].step == 2
    runner.run_stage(job(copy, target=2))
    assert_close(copy, finished, "stage-2")


@pytest.mark.slow
def test_a_first_rank_that_fails_while_others_train_says_so_and_ends_them(copy: Path, tmp_path: Path) -> None:
    shutil.rmtree(copy / "stage-2")
    often = ["--set", "train.save_every=1e-6"]
    found = on_ranks(2, call, tmp_path, ["stage", "2", *asked(copy), *often], {}, None, None, 0)
    assert found == [1, 1]
    (line,) = complaints(words(tmp_path, 2))
    assert line == "[Errno 28] No space left on device"


def test_a_rank_that_never_comes_ends_the_call(copy: Path, tmp_path: Path) -> None:
    """It says why by itself, and the others do not wait for half an hour."""
    assert on_ranks(2, call, tmp_path, ["stage", "2", *asked(copy)], {1: ["--set", "train.lr=-1.0"]}) == [2, 2]
    (line,) = complaints(words(tmp_path, 2))
    assert line.startswith("train.lr")


@pytest.mark.slow
def test_torchrun_told_to_stop_stops_all_ranks_with_the_state_saved(tmp_path: Path) -> None:
    root, config = tmp_path / "run", toy(**{"schedule.epochs": [60, 1, 2], "train.save_every": 1000.0})
    root.mkdir()
    (root / "config.toml").write_text(to_toml(config))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(
            [*torchrun, "pipeline", "stage", "0", *asked(root)],
            cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
        events, latest = root / "events.jsonl", time.monotonic() + 120
        try:
            while process.poll() is None and not (events.exists() and events.stat().st_size):
                assert time.monotonic() < latest, "it has not begun to train"
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()
    said = (tmp_path / "out").read_text()
    (line,) = complaints([said])
    (step,) = re.findall(r"interrupted: stage 0 is saved at step (\d+) of 360", line)
    progress = read_state(root / "stage-0" / "last" / "state.safetensors")[1]
    assert progress.step == int(step) and "forcefully" not in said
    assert said.count("stopping: the state is being saved") == 1
    assert record(root, "stage-0")["status"] == "running"
