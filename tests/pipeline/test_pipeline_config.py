"""Settings: one strict parser, one-line refusals, an exact round trip through TOML."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.config import CacheConfig
from models.config import ModelConfig
from pipeline import machine as machine_module
from pipeline.checks import BOUNDS, check
from pipeline.config import ConfigError, PipelineConfig, get
from pipeline.machine import described, processor, resolve
from pipeline.reading import flatten, load_config, parse, parse_override, read_toml, to_toml
from pipeline.recipes import RECIPES, sample
from stages.config import DataConfig, ScheduleConfig, TrainConfig

REPOSITORY = Path(__file__).parents[2]


def refusal(*overrides: str, config: str = "sample") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides)
    message = str(caught.value)
    assert "\n" not in message and "│" not in message
    return message


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.lr=1e-3", "train.lr", 1e-3),
        ("seed=7", "seed", 7),
        ("schedule.scale_lr=false", "schedule.scale_lr", False),
        ("schedule.scale_lr=True", "schedule.scale_lr", True),
        ("schedule.epochs = [1, 2, 3, 4]", "schedule.epochs", (1, 2, 3, 4)),
        ("data.crop_scale=[0.5,1]", "data.crop_scale", (0.5, 1.0)),
        ('data.source="a b"', "data.source", "a b"),
        ("data.source=a b", "data.source", "a b"),
        ("data.source='x=1'", "data.source", "x=1"),
        ("data.source=--odd", "data.source", "--odd"),
        ("data.source=1e3", "data.source", "1e3"),
        ("data.source=[ab]*.tar", "data.source", "[ab]*.tar"),
        ("data.source=t-{000000..000007}.tar", "data.source", "t-{000000..000007}.tar"),
        ("mask.groups=2", "mask.groups", 2),
    ],
)
def test_override_is_read(text: str, key: str, value: Any) -> None:
    settings_read = load_config("sample", [text])[1]
    assert get(settings_read, key) == value
    assert type(get(settings_read, key)) is type(value)
    before, after = _flat(sample()), _flat(settings_read)
    assert {other for other in before if before[other] != after[other]} <= {key}


def test_later_override_wins_and_data_is_short_for_the_source() -> None:
    name, read = load_config("sample", ["train.lr=1", "train.lr=2", "data.source=a"], data="b", val="c")
    assert (name, read.train.lr, read.data.source, read.data.val_source) == ("sample", 2.0, "b", "c")


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lrr=1", ["no setting train.lrr", "did you mean train.lr?"]),
        ("train.epochs=4", ["no setting train.epochs", "did you mean schedule.epochs?"]),
        ("train=4", ["no setting train;"]),
        ("train.lr", ["'train.lr' is not key=value", "train.lr=1e-3"]),
        ("train.lr=fast", ["train.lr", "'fast'"]),
        ("train.lr=[1,2]", ["train.lr = [1, 2] is not one value"]),
        ("seed=1.5", ["seed", "'1.5'"]),
        ("mask.groups=3", ["mask.groups", "'1', '2', '4'"]),
        ("cache.codec=int9", ["cache.codec", "int9", "float16"]),
        ("data.crop_scale=[0.5]", ["data.crop_scale", "2 values"]),
        ("mask.ratio=1", ["mask.ratio = 1.0 is outside (0, 1)"]),
        ("mask.ratio=nan", ["mask.ratio = nan is outside (0, 1)"]),
        ("mask.ratio=0.5", ["keeps 98 of 196", "only 49", "raise mask.ratio"]),
        ("mask.ratio=0.999", ["leaves none of the 196"]),
        ("model.patch_size=5", ["model.patch_size = 5", "model.image_size = 56", "model.image_size=55"]),
        ("model.image_size=20", ["mask.groups = 4 does not divide the 25 tokens"]),
        ("model.width=6", ["model.width = 6", "divisible by 4"]),
        ("decoder.heads=5", ["decoder.width = 64", "decoder.heads = 5"]),
        ("train.accumulate=3", ["train.batch_size = 64", "train.accumulate = 3"]),
        ("train.min_lr=1", ["train.min_lr = 1.0", "train.lr = 0.001"]),
        ("train.device=tpu", ["train.device = tpu", "cuda:<n>"]),
        ("data.crop_scale=[1,0.5]", ["data.crop_scale = [1.0, 0.5]"]),
        ("data.crop_scale=[0.5,2]", ["<= 1.0"]),
        ("data.source=", ["data.source is empty"]),
        ("schedule.cuts=[0,3]", ["[0, 3]", "[2, 1, 1, 3]", "differ in length"]),
        ("schedule.cuts=[1,3,6,9]", ["does not start at 0"]),
        ("schedule.cuts=[0,6,3,9]", ["does not start at 0 and rise"]),
        ("schedule.epochs=[2,0,2,2]", ["less than 1 epoch"]),
        ("mask.ratio_end=0.5", ["mask.ratio_end = 0.5 keeps 98 of 196", "only 49"]),
        ("mask.block=8", ["mask.block = 8", "larger than a quarter of the 196 tokens"]),
        ("mask.distance_start=0", ["mask.distance_start = 0.0 is outside (0, 1]"]),
        ("decoder.share=0", ["decoder.share = 0.0 is outside (0, 1]"]),
        ("heads.scales=[4]", ["heads.scales = [4.0] without heads.blocks"]),
        ("heads.weights=2", ["heads.weights = 2 without heads.blocks weighs nothing"]),
        ("heads.blocks=[2,4]", ["heads.blocks = [2, 4] must rise from 1 or more to 12"]),
        ("heads.blocks=[4,2,12]", ["must rise"]),
        ("cache.backend=webdataset cache.filter=zstd", ["compresses no member of a tar; use cache.backend=zarr"]),
        ("cache.block=0", ["cache.block = 0 is outside [1, inf)"]),
        ("cache.max_error=0", ["cache.max_error = 0.0 is outside (0, inf)"]),
        ("cache.codec=int8 cache.block=20", ["cache.block = 20 does not divide the 192 channels", "cache.block=16"]),
        ("cache.filter=gzip", ["cache.filter = gzip is unknown; use none, lz4, zstd, bitround-<bits kept>"]),
        ("cache.codec=int8 cache.filter=bitround-3", ["rounds floats, but cache.codec = int8 stores none"]),
        ("cache.filter=bitround-11", ["bitround-11 keeps more than the 10 bits of float16; use 1..10"]),
        ("cache.later_codec=bfloat16 cache.filter=bitround-8", ["more than the 7 bits of bfloat16; use 1..7"]),
        ("schedule.cuts=[0,3] schedule.epochs=[1,1] cache.later_codec=int8", ["is for a second cut", "leave it empty"]),
        ("schedule.settle_checks=0", ["schedule.settle_checks = 0 is outside [1, inf)"]),
        ("schedule.caches=cost", ["schedule.kind = explicit has none", "schedule.kind=freezeout"]),
        ("schedule.freeze_embed=false", ["backward has to cross every block", "[0, 3, 6, 9]", "schedule.cuts=[0]"]),
        ("train.early_stop=2", ["train.early_stop = 2", "eval.every = 0", "eval.every=1"]),
        ("train.save_epochs=[3,9]", ["train.save_epochs has 9", "1..7"]),
        ("train.decay_share=0", ["train.decay_share = 0.0 is outside (0, 1]"]),
        ("schedule.epochs=[0,1,1,3]", ["starts stage 1 from", "give a checkpoint with model.weights=<file>"]),
        ("schedule.epochs=[1,0,1,3]", ["has a stage of less than 1 epoch"]),
        ("model.registers=-1", ["model.registers = -1 is outside [0, inf)"]),
        ("cluster.workers=-1", ["cluster.workers = -1 is outside [0, inf)"]),
    ],
)
def test_wrong_setting_is_refused_in_one_line(override: str, parts: list[str]) -> None:
    message = refusal(*override.split(" "))
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("heads.scales=[1]",), ["heads.scales = [1.0] and heads.blocks = [6, 12] differ in length"]),
        (("heads.targets=[hog]",), ["heads.targets = ['hog'] and heads.blocks = [6, 12] differ in length"]),
        (("heads.scales=[3,1]",), ["heads.scales has 3.0; use 4, 2, 1 or 0.5"]),
        (("heads.scales=[2,1]", "target.kind=features"), ["heads.scales has 2.0 for a head of features", "scale 1"]),
        (("heads.scales=[0.5,1]", "decoder.share=0.5"), ["which needs all tokens, but decoder.share = 0.5"]),
        (("heads.scales=[4,1]", "model.patch_size=2", "model.image_size=28"), ["does not divide model.patch_size = 2"]),
        (("heads.scales=[0.5,1]", "model.image_size=28", "mask.groups=1"), ["grid of 7 tokens a side"]),
        (("heads.weights=1,2,3",), ["'1,2,3' is not 2 weights"]),
        (("heads.weights=1,-2",), ["'1,-2' is not 2 weights, one a head, none below 0"]),
        (("heads.weights=one,two",), ["'one,two' is neither equal nor numbers"]),
        (("heads.weights=1,1/0",), ["is neither equal nor numbers"]),
    ],
)
def test_heads_that_make_no_sense_are_refused_in_one_line(overrides: tuple[str, ...], parts: list[str]) -> None:
    message = refusal("heads.blocks=[6,12]", *overrides)
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal"])
def test_refusal_does_not_depend_on_where_it_is_shown(encoding: str, terminal: bool) -> None:
    code = "from pipeline.reading import load_config; load_config('sample', ['mask.groups=3'])"
    ends = pty.openpty()
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONIOENCODING": encoding, "TERM": "xterm"},
        stdout=ends[1] if terminal else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    for end in ends:
        os.close(end)
    want = "invalid choice '3' for argument '--mask.groups'. Expected one of ('1', '2', '4')"
    assert shown.stderr.splitlines()[-1] == f"pipeline.config.ConfigError: {want}; `--help` lists every setting"


def test_bounds_name_numbers_that_exist_and_hold_the_defaults() -> None:
    numbers = {key for key, value in _flat(PipelineConfig()).items() if type(value) in (int, float)}
    assert numbers - set(BOUNDS) == {"mask.groups"}, "its choices are in its type"
    assert set(BOUNDS) <= numbers
    check(PipelineConfig())


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["schedule.kind=freezeout", "train.lr_schedule=schedule_free"],
            ["schedule_free has no schedule", "use schedule.layer_rates=shared"],
        ),
        (
            ["schedule.kind=freezeout", "train.lr_restart=true"],
            ["train.lr_restart = True", "schedule.layer_rates=shared"],
        ),
        (
            ["schedule.kind=adaptive", "train.lr_restart=true"],
            ["train.lr_restart = True", "cosine", "train.lr_schedule=constant"],
        ),
        (["schedule.kind=adaptive", "train.max_steps=5"], ["train.max_steps = 5", "train.max_steps=0"]),
        (["schedule.kind=freezeout", "train.max_steps=5"], ["train.max_steps = 5", "7 epochs", "train.max_steps=0"]),
        (
            ["schedule.kind=freezeout", "schedule.cuts=[0]", "schedule.caches=cost", "schedule.freeze_embed=false"],
            ["nothing can be cached", "schedule.caches=given"],
        ),
    ],
)
def test_schedules_and_rates_that_contradict_each_other_are_refused(overrides: list[str], parts: list[str]) -> None:
    message = refusal(*overrides)
    assert [part for part in parts if part not in message] == [], message


@pytest.mark.parametrize(
    "overrides",
    [
        ["schedule.kind=freezeout", "train.lr_schedule=schedule_free", "schedule.layer_rates=shared"],
        ["schedule.kind=freezeout", "schedule.cuts=[0]", "schedule.freeze_embed=false"],
        ["schedule.kind=adaptive", "train.lr_restart=true", "train.lr_schedule=constant"],
        ["schedule.kind=adaptive", "train.early_stop=2", "eval.every=1"],
        ["train.lr_schedule=wsd", "train.lr_restart=true", "train.save_epochs=[7,2]"],
    ],
)
def test_schedules_and_rates_that_go_together_are_allowed(overrides: list[str]) -> None:
    check(load_config("sample", overrides)[1])


def test_features_of_groups_and_one_group_are_allowed() -> None:
    assert load_config("sample", ["target.kind=features"])[1].mask.groups == 4
    assert load_config("sample", ["mask.groups=1", "mask.ratio=0.1"])[1].mask.ratio == 0.1


@pytest.mark.parametrize("name", RECIPES)
def test_toml_gives_back_the_same_settings(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(RECIPES[name]()))
    assert read_toml(path) == RECIPES[name]()


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
counts = st.integers(-(2**40), 2**40)
floats = st.floats(allow_nan=False)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=counts,
    source=texts,
    root=texts,
    cuts=st.lists(counts, max_size=4).map(tuple),
    numbers=st.tuples(floats, floats),
    switch=st.booleans(),
)
def test_any_value_survives_toml(
    tmp_path: Path, seed: int, source: str, root: str, cuts: Any, numbers: tuple[float, float], switch: bool
) -> None:
    value = PipelineConfig(
        seed=seed,
        data=DataConfig(source=source, crop_scale=numbers),
        schedule=ScheduleConfig(cuts=cuts, scale_lr=switch),
        cache=CacheConfig(root=root),
        train=TrainConfig(lr=numbers[0]),
    )
    path = tmp_path / "config.toml"
    path.write_text(to_toml(value), encoding="utf-8", newline="")
    assert read_toml(path) == value


def test_a_file_may_leave_settings_out_and_names_the_run(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("seed = 3\n[schedule]\ncuts = [0, 4]\nepochs = [1, 1]\n")
    name, read = load_config(str(path), ["train.lr=0.5"])
    assert name == "mine"
    assert read == PipelineConfig(
        seed=3, schedule=ScheduleConfig(cuts=(0, 4), epochs=(1, 1)), train=TrainConfig(lr=0.5)
    )
    run = tmp_path / "runs" / "abc" / "config.toml"
    run.parent.mkdir(parents=True)
    run.write_text(to_toml(read))
    assert load_config(str(run)) == ("abc", read)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("seed = ", "no TOML file"),
        ("[train]\nlrr = 1\n", "did you mean train.lr?"),
        ("[train]\nlr = 2024-01-01\n", "train.lr"),
        ("[schedule]\ncuts = [0, 'x']\n", "schedule.cuts"),
    ],
)
def test_wrong_file_is_named(text: str, part: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    message = refusal(config=str(path))
    assert str(path) in message and part in message


def test_unknown_recipe_and_missing_file() -> None:
    assert "did you mean sample?" in refusal(config="smaple")
    assert "sample, cifar10, vit_b16, localmim, original" in refusal(config="qqqqqq")
    assert "no config file nowhere.toml" in refusal(config="nowhere.toml")


def test_parse_override_keeps_everything_after_the_first_equals_sign() -> None:
    assert parse_override("data.source=a=b") == ("data.source", "a=b")


def test_parse_without_values_is_the_base_itself() -> None:
    base = sample()
    assert parse({}, base) is base


# --- what is left to the machine -------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine that has cuda:0 with bfloat16 and 5 cores; the list records what was asked of torch."""
    asked: list[str] = []

    def answer(question: str, value: str) -> str:
        asked.append(question)
        return value

    monkeypatch.setattr(machine_module, "_device", lambda: answer("device", "cuda"))
    monkeypatch.setattr(machine_module, "_precision", lambda device: answer(device, "bfloat16"))
    monkeypatch.setattr(machine_module, "available_cores", lambda: 5)
    return asked


@pytest.mark.parametrize(("quota", "cores"), [((100_000, 100_000), 1), ((None, None), len(os.sched_getaffinity(0)))])
def test_a_containers_share_of_time_bounds_the_threads(
    monkeypatch: pytest.MonkeyPatch, quota: tuple[int | None, int | None], cores: int
) -> None:
    monkeypatch.setattr("dask.system._try_extract_cgroup_cpu_quota", lambda: quota)
    given = replace(PipelineConfig(), train=TrainConfig(device="cpu", precision="float32"))
    assert resolve(given).train.threads == cores


def test_resolve_fills_every_auto(machine: list[str]) -> None:
    train = resolve(PipelineConfig()).train
    assert (train.device, train.precision, train.threads) == ("cuda", "bfloat16", 5)
    assert machine == ["device", "cuda"]


def test_resolve_keeps_what_is_given_and_what_the_run_began_with(machine: list[str]) -> None:
    before = replace(PipelineConfig(), train=TrainConfig(device="cpu", precision="float32", threads=2))
    assert resolve(PipelineConfig(), before) == before
    given = replace(PipelineConfig(), train=TrainConfig(device="cpu", precision="bfloat16", threads=3))
    assert resolve(given, before) == given
    assert machine == []


def test_resolve_asks_only_for_what_is_open(machine: list[str]) -> None:
    given = replace(PipelineConfig(), train=TrainConfig(device="cpu"))
    assert resolve(given).train.precision == "bfloat16"
    assert machine == ["cpu"]


def test_resolve_without_looking_up(machine: list[str]) -> None:
    train = resolve(PipelineConfig(), detect=False).train
    assert (train.device, train.precision, train.threads) == ("auto", "auto", 5)
    assert machine == []


def test_this_machine_is_resolved_to_something_torch_accepts() -> None:

    train = resolve(PipelineConfig(model=ModelConfig())).train
    torch.ones(1, device=train.device, dtype=getattr(torch, train.precision))
    assert train.threads >= 1
    assert "torch" in sys.modules


def _flat(value: PipelineConfig) -> dict[str, Any]:
    return dict(flatten(asdict(value)))


def test_a_gpu_is_told_by_its_name_and_its_host_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kinds in one host take other seconds."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", {"cuda": "Big", "cuda:1": "Small"}.__getitem__)
    runs = [replace(PipelineConfig(), train=TrainConfig(device=device)) for device in ("cuda", "cuda:1", "cpu")]
    named = [described(run)["device"] for run in runs]
    assert named == [f"cuda (Big, {processor()})", f"cuda:1 (Small, {processor()})", f"cpu ({processor()})"]
