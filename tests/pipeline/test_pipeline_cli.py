"""The command line: verbs, exit statuses, one-line errors, signals, and how fast it answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import __main__ as cli
from pipeline.config import ConfigError, PipelineConfig
from pipeline.job import Interrupted, Job, RunFailed
from pipeline.layout import RunPaths
from pipeline.machine import SPIN, wait_briefly
from pipeline.reading import read_toml, to_toml

REPOSITORY = Path(__file__).parents[2]
Verbs = Callable[..., list[Job]]


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs go to a scratch folder and torch is not asked about the machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.machine._device", lambda: "cpu")
    monkeypatch.setattr("pipeline.machine._precision", lambda device: "float32")


@pytest.fixture
def verbs(monkeypatch: pytest.MonkeyPatch) -> Verbs:
    """Puts a function in the place of every verb's own; returns the jobs that it was given."""

    def install(act: Callable[[Job], Any] = lambda job: None) -> list[Job]:
        jobs: list[Job] = []

        def run(job: Job) -> None:
            jobs.append(job)
            act(job)

        monkeypatch.setitem(sys.modules, "pipeline.fake", types.SimpleNamespace(run=run))
        for name, verb in cli.VERBS.items():
            if verb.function:
                fake = cli.Verb("pipeline.fake:run", verb.help, verb.target, verb.saves, torch=verb.torch)
                monkeypatch.setitem(cli.VERBS, name, fake)
        return jobs

    return install


def test_a_job_holds_the_whole_request(verbs: Verbs) -> None:
    jobs = verbs()
    places = "--config vit_b16 --data a --data-val b --run here --cache-root there --yes"
    numbers = "--set seed=4 cache.views=3 --set seed=5 --train.lr 0.5 --schedule.scale_lr False"
    assert cli.main(["stage", "2", *places.split(), *numbers.split()]) == 0
    (job,) = jobs
    config = job.config
    assert (job.name, job.target, job.yes, job.stop.is_set()) == ("vit_b16", 2, True, False)
    assert job.paths == RunPaths(Path("here"), Path("there"))
    assert (config.data.source, config.data.val_source, config.cache.root) == ("a", "b", "there")
    assert (config.seed, config.cache.views, config.train.lr, config.schedule.scale_lr) == (5, 3, 0.5, False)
    assert (config.train.device, config.train.precision, config.model.name) == ("cpu", "float32", "vit_base")


@pytest.mark.parametrize("name", [name for name, verb in cli.VERBS.items() if verb.function and not verb.target])
def test_verb_without_a_target(name: str, verbs: Verbs) -> None:
    jobs = verbs()
    assert cli.main([name]) == 0
    assert [(job.name, job.target, job.yes, job.paths.root) for job in jobs] == [
        ("sample", None, False, Path("runs/sample"))
    ]


def test_targets(verbs: Verbs) -> None:
    jobs = verbs()
    calls = ["stage 0", "cache 1", "arm e2e", "arm freeze", "probe", "probe 3", "probe e2e", "stage --train.lr 1 2"]
    assert [cli.main(call.split()) for call in calls] == [0] * len(calls)
    assert [job.target for job in jobs] == [0, 1, "e2e", "freeze", None, 3, "e2e", 2]


def test_a_run_goes_on_with_the_device_it_began_with(verbs: Verbs) -> None:
    jobs = verbs()
    Path("runs/sample").mkdir(parents=True)
    Path("runs/sample/config.toml").write_text(to_toml(PipelineConfig()).replace('device = "auto"', 'device = "cuda"'))
    assert cli.main(["all"]) == cli.main(["all", "--train.device", "cpu"]) == 0
    assert [job.config.train.device for job in jobs] == ["cuda", "cpu"]


def test_status_and_explain_do_not_ask_torch(verbs: Verbs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.machine._device", lambda: pytest.fail("asked torch"))
    jobs = verbs()
    assert cli.main(["status"]) == cli.main(["explain"]) == 0
    assert [job.config.train.device for job in jobs] == ["auto", "auto"]


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        ("stagee 1", ["no verb stagee", "did you mean stage?"]),
        ("stage", ["stage needs N", "permafrost stage N"]),
        ("stage 4", ["stage 4 is outside 0..3"]),
        ("cache 0", ["cache 0 is outside 1..3"]),
        ("stage x", ["does not know 'x'"]),
        ("stage 1 2", ["'2'"]),
        ("status 1", ["status does not know what to do with '1'"]),
        ("arm cached", ["'cached'", "e2e, freeze"]),
        ("stage 1 --train.lrr 1", ["no setting train.lrr", "did you mean train.lr?"]),
        ("stage 1 --train.lrr=1", ["did you mean train.lr?"]),
        ("stage 1 --mask.groups 3", ["mask.groups", "'1', '2', '4'"]),
        ("stage 1 --mask.ratio 2", ["mask.ratio = 2.0 is outside (0, 1)"]),
        ("stage 1 --set train.lr", ["is not key=value"]),
        ("stage 1 --nope", ["nope"]),
        ("stage 1 --config", ["--config"]),
        ("stage 1 --config smaple", ["did you mean sample?"]),
        ("finetune 4", ["finetune 4 is outside 0..3"]),
        ("finetune cached", ["'cached'", "e2e, freeze"]),
        ("export cached", ["'cached'", "e2e, freeze", "permafrost export [N|ARM]"]),
    ],
)
def test_wrong_request_is_one_line_and_exit_2(
    call: str, parts: list[str], verbs: Verbs, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = verbs()
    assert cli.main(call.split()) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), jobs) == ("", 1, [])
    assert [part for part in parts if part not in err] == [], err


def test_flags_may_mend_what_a_file_leaves_wrong(verbs: Verbs) -> None:
    jobs = verbs()
    Path("mine.toml").write_text("[mask]\nratio = 0.5\n")
    assert cli.main(["status", "--config", "mine.toml"]) == 2
    assert cli.main(["status", "--config", "mine.toml", "--mask.ratio", "0.8"]) == 0
    assert jobs[0].config.mask.ratio == 0.8


def raising(error: BaseException) -> Callable[[Job], None]:
    def act(job: Job) -> None:
        raise error

    return act


def of_a_library(job: Job) -> None:
    json.loads("{")  # a ValueError that no line of this project raised


class SettingError(ValueError):
    """Stands for the errors of the four packages."""


SettingError.__module__ = "stages.images"


@pytest.mark.parametrize(
    ("act", "status", "traceback"),
    [
        (raising(ConfigError("bad\n  value")), 2, False),
        (raising(SettingError("bad value")), 2, False),
        (raising(FileNotFoundError(2, "No such file", "x.tar")), 2, False),
        (raising(PermissionError(13, "Permission denied", "x")), 2, False),
        (raising(OSError(28, "No space left on device")), 1, False),
        (raising(RunFailed("loss is nan at step 3; lower train.lr")), 1, False),
        (raising(Interrupted("stage 1 is saved at step 3; `make stage-1` goes on")), 130, False),
        (raising(KeyboardInterrupt()), 130, False),
        (raising(RuntimeError("a bug")), 1, True),
        (raising(AssertionError("a bug")), 1, True),
        (of_a_library, 1, True),
    ],
)
def test_exit_status_of_an_error(
    act: Callable[[Job], None], status: int, traceback: bool, verbs: Verbs, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs(act)
    assert cli.main(["verify"]) == status
    err = capsys.readouterr().err
    assert ("Traceback" in err) == traceback
    if not traceback:
        assert err.startswith("permafrost: ") and err.count("\n") == 1


def test_a_value_error_raised_by_a_line_of_this_project_is_the_users(verbs: Verbs) -> None:
    def act(job: Job) -> None:
        exec("raise ValueError('width')", {"__name__": "models.vit"})

    verbs(act)
    assert cli.main(["verify"]) == 2


def test_debug_adds_the_traceback(verbs: Verbs, capsys: pytest.CaptureFixture[str]) -> None:
    verbs(raising(RunFailed("loss is nan")))
    assert cli.main(["verify", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1] == "permafrost: loss is nan"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_sets_stop_and_the_second_interrupts(
    number: signal.Signals, verbs: Verbs, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[bool] = []

    def act(job: Job) -> None:
        seen.append(job.stop.is_set())
        os.kill(os.getpid(), number)
        seen.append(job.stop.is_set())
        os.kill(os.getpid(), number)
        seen.append(True)

    before = signal.getsignal(number)
    verbs(act)
    assert cli.main(["stage", "0"]) == 130
    assert seen == [False, True]
    assert signal.getsignal(number) is before
    assert [line.split(":")[0] for line in capfd.readouterr().err.splitlines()] == ["stopping", "permafrost"]


def test_a_verb_that_saves_nothing_ends_at_the_first_signal(verbs: Verbs) -> None:
    verbs(lambda job: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born without it
    try:
        assert cli.main(["verify"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)


def test_help_lists_every_setting_with_the_recipes_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stage", "1", "--config", "vit_b16", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: permafrost stage [-h] [OPTIONS] N\n")
    assert [key for key in _settings() if f"--{key} " not in out] == []
    assert "Samples in one shard file" in out and "(default: 16)" in out and "vit_base" in out
    assert "--cache_root" in out and "--debug" in out


def test_overview_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert [name for name in cli.VERBS if name not in out] == []
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "permafrost 0.1.0\n"


def test_reading_a_request_needs_no_torch() -> None:
    code = (
        "import sys; from pipeline.__main__ import read_job; read_job('status', []); read_job('explain', []);"
        "print([name for name in ('torch', 'numpy', 'zarr', 'timm', 'distributed') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "[]\n"


def test_the_written_config_is_a_config(verbs: Verbs) -> None:
    jobs = verbs()
    cli.main(["all", "--set", "seed=9"])
    Path("again.toml").write_text(to_toml(jobs[0].config))
    cli.main(["all", "--config", "again.toml"])
    assert jobs[1].config == jobs[0].config == read_toml(Path("again.toml"))


def _settings() -> list[str]:
    from dataclasses import asdict

    from pipeline.reading import flatten

    return list(dict(flatten(asdict(PipelineConfig()))))


@pytest.mark.parametrize(
    ("chosen", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": SPIN}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_idle_threads_soon_let_go_of_their_core_unless_somebody_chose(
    chosen: dict[str, str], after: dict[str, str]
) -> None:
    environment = dict(chosen)
    wait_briefly(environment)
    assert environment == after


def test_how_threads_wait_is_settled_before_torch_reads_it() -> None:
    code = (
        "import os, sys\n"
        "from pipeline.__main__ import main\n"
        "assert 'torch' not in sys.modules\n"
        "assert main(['--version']) == 0\n"
        "print(os.environ['GOMP_SPINCOUNT'])"
    )
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    told = subprocess.run(
        [sys.executable, "-c", code], env=plain, cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert told.stdout.splitlines()[-1] == SPIN
