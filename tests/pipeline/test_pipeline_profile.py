"""Device profiles: a value that goes through files unchanged, errors of one line, and those that ship."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.__main__ import main
from pipeline.config import ConfigError
from pipeline.profile import BlockRate, CodecRate, DeviceProfile, read_profile, shipped, to_toml

PROFILE = DeviceProfile(
    name="paper",
    device="a machine on paper",
    origin="assumed",
    assumptions=("Round numbers.",),
    blocks=(BlockRate(32, 4, 0.002, 0.001), BlockRate(16, 16, 0.004, 0.0005)),
    codecs=tuple(CodecRate(codec, 0.001, 0.002) for codec in ("float16", "bfloat16", "int8")),
    embed_tflops=0.0005,
    optimizer_rate=1e6,
    step_seconds=0.01,
    crop_seconds=0.002,
    write_rate=1e6,
    read_rate=2e6,
    disk_rate=1e12,
    start_seconds=3.0,
    compile_seconds=5.0,
    compile_gain=0.5,
    cores=4,
    busy_cores=0,
    memory_gb=1.0,
    disk_gb=1.0,
    price_per_hour=3.6,
)


@pytest.mark.parametrize("name", shipped())
def test_what_ships_parses_and_states_its_assumptions(name: str) -> None:
    found = read_profile(name)
    assert found.name == name and len(found.assumptions) >= 4
    text = " ".join(found.assumptions).lower()
    if found.origin == "assumed":
        for word in ("peak", "tflop/s", "utilisation", "gb/s", "disk", "usd an hour", "bfloat16", "jpeg"):
            assert word in text, word
        assert found.price_per_hour > 0 and found.busy_cores == 0
        peak = float(text.partition("peak: ")[2].split()[0])
        assert all(0.03 * peak < rate.learning < rate.frozen < 0.6 * peak for rate in found.blocks)


def test_there_are_profiles_of_gpus_and_of_two_cores() -> None:
    assert shipped() == ["a100-80gb", "h100-sxm", "rtx4090", "two-cores"]
    a100 = read_profile("a100-80gb")
    assert a100.rate(768, 49).learning == pytest.approx(0.40 * 312, rel=0.01)
    assert a100.optimizer_rate == pytest.approx(2039e9 / 2 / 28, rel=0.02), "28 bytes a parameter"


def test_a_profile_goes_through_toml_and_json_unchanged(tmp_path: Path) -> None:
    for suffix, text in (("toml", to_toml(PROFILE)), ("json", json.dumps(PROFILE.to_dict()))):
        (tmp_path / f"p.{suffix}").write_text(text)
        assert read_profile(str(tmp_path / f"p.{suffix}")) == PROFILE
    (tmp_path / "plan.json").write_text(json.dumps({"stages": [], "profile": PROFILE.to_dict()}))
    assert read_profile(str(tmp_path / "plan.json")) == PROFILE, "a plan holds the profile that it was made with"
    assert DeviceProfile.from_dict(PROFILE.to_dict()) == PROFILE


def test_the_nearest_entry_speaks_for_a_block() -> None:
    assert PROFILE.rate(32, 4).learning == 0.001
    assert PROFILE.rate(16, 12).learning == 0.0005, "width 16 exactly, 12 tokens nearer to 16"
    assert PROFILE.rate(24, 15).learning == 0.0005, "ln 1.5 + ln 16/15 against ln 1.33 + ln 3.75"


def spoilt(**changes: Any) -> dict[str, Any]:
    found = PROFILE.to_dict() | changes
    return {key: value for key, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (spoilt(cores=None), "the profile: cores is missing; add it"),
        (spoilt(core=3), "the profile: no field core; did you mean cores?"),
        (spoilt(cores=2.5), "cores = 2.5 is no whole number; correct it"),
        (spoilt(read_rate=0), "read_rate = 0 must be above 0; correct it"),
        (spoilt(step_seconds=-1), "step_seconds = -1 must be at least 0; correct it"),
        (spoilt(name=3), "name = 3 is no text; put it in quotes"),
        (spoilt(origin="guessed"), "origin = guessed is unknown; use measured or assumed"),
        (spoilt(assumptions=[]), "assumptions is empty; say in a sentence or more where the numbers come from"),
        (spoilt(assumptions=[""]), "assumptions is no list of sentences; write one text for each"),
        (spoilt(blocks=[]), r"blocks is no list of tables; write \[\[blocks\]\] once or more often"),
        (spoilt(blocks=[{"width": 3}]), "the profile: blocks: tokens is missing; add it"),
        (spoilt(codecs=PROFILE.to_dict()["codecs"][:2]), "lacks int8; give the rates of float16, bfloat16, int8"),
        ([], "the profile is no table; see the profiles in pipeline/profiles"),
    ],
)
def test_what_is_wrong_with_a_profile_is_one_line(values: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as found:
        DeviceProfile.from_dict(values)
    assert "\n" not in str(found.value)


def test_a_profile_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no device profile a100-80g; did you mean a100-80gb\?"):
        read_profile("a100-80g")
    with pytest.raises(ConfigError, match="profile zx; choose one of a100-80gb, h100-sxm, rtx4090, two-cores, or give"):
        read_profile("zx")
    with pytest.raises(ConfigError, match="there is no such file"):
        read_profile(str(tmp_path / "gone.toml"))
    (tmp_path / "bad.toml").write_text("name = ")
    with pytest.raises(ConfigError, match=r"bad\.toml is no TOML file"):
        read_profile(str(tmp_path / "bad.toml"))


def test_the_flags_belong_to_plan_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for verb in ("stage 1", "status", "all"):
        assert main([*verb.split(), "--run", str(tmp_path / "r"), "--images", "5"]) == 2
        assert "no setting images" in capsys.readouterr().err
    for words, told in (
        (["--images", "-3"], "--images -3 must be at least 1"),
        (["--images", "x"], "invalid"),
        (["--images", "5"], "--images 5 is less than a batch, train.batch_size = 64; lower it or raise that"[:46]),
        (["--device-profile", "h100"], "no device profile h100; did you mean h100-sxm?"),
    ):
        assert main(["plan", "--run", str(tmp_path / "r"), "--set", "train.device=cpu", *words]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1
    assert main(["plan", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--images" in shown and "--device-profile" in shown.replace("_", "-")


def test_every_field_says_what_it_is() -> None:
    assert all(field.name in DeviceProfile.__annotations__ for field in dataclasses.fields(DeviceProfile))
    assert PROFILE.to_dict().keys() == {field.name for field in dataclasses.fields(DeviceProfile)}
