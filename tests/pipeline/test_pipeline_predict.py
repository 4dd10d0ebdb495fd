"""Predictions by hand from a profile of round numbers; memory against what autograd really keeps; plans on paper."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.config import ModelConfig
from models.vit import build_encoder, use_attention
from pipeline import costs, rehearse
from pipeline.decide import Wanted
from pipeline.layout import RunPaths
from pipeline.memory import block_bytes, peak_bytes
from pipeline.predict import OnProfile, StageCost, beside, on_paper, predict, row_bytes, stage_costs, totals
from pipeline.profile import read_profile, to_toml
from pipeline.rehearse import Built, paced
from stages.device import autocast
from tests.pipeline.test_pipeline_profile import PROFILE
from tests.pipeline.toy import job, toy

# 16 tokens of width 32, 4 of them visible, patches of 48 values, 4 blocks; a decoder block of width 16 over 16 tokens.
BLOCK = 24 * 4 * 32**2 + 4 * 4**2 * 32
# Keys and values of all 16; queries, projection, MLP and what is read of the 12 hidden ones.
DECODER = 2 * 32 * (4 * 16 + 12 * (16 + 48)) + (4 * 16 + 20 * 12) * 16**2 + 4 * 16 * 12 * 16
EMBEDDING = 2 * 16 * 48 * 32
DECODER_PARAMETERS = 12 * 16**2 + 16 * (2 * 32 + 48)
IMAGES, STEPS = 9600, 600
LEARNING = 3 * BLOCK / 1e9
"""Seconds of a learning block for an image, at 0.001 TFLOP/s."""


def step(learning: int, image: float, embedding: int = 0) -> float:
    """Seconds of a step of 16 images with so many learning blocks."""
    parameters = learning * 12 * 32**2 + DECODER_PARAMETERS + embedding
    return 16 * (learning * LEARNING + 3 * DECODER / 5e8 + image) + parameters / 1e6 + 0.01


def test_every_arm_s_stage_by_hand() -> None:
    e2e, one, three = predict(toy(), PROFILE, IMAGES)
    live = step(4, 2 * EMBEDDING / 5e8, embedding=48 * 32)
    assert live == pytest.approx(0.10173, abs=1e-5)
    assert e2e.e2e_seconds == e2e.freeze_seconds == e2e.cached_seconds == pytest.approx(STEPS * live)
    assert one.e2e_seconds == pytest.approx(STEPS * live) and three.e2e_seconds == pytest.approx(2 * STEPS * live)
    frozen = BLOCK / 2e9
    assert one.freeze_seconds == pytest.approx(STEPS * step(3, EMBEDDING / 5e8 + frozen))
    assert three.freeze_seconds == pytest.approx(2 * STEPS * step(1, EMBEDDING / 5e8 + 3 * frozen))
    assert one.cached_seconds == pytest.approx(STEPS * step(3, 0.0))
    assert three.cached_seconds == pytest.approx(2 * STEPS * step(1, 0.0))
    assert (one.images, three.images) == (9600, 19200) and one.images_per_second("cached") == pytest.approx(
        16 / step(3, 0.0)
    )


def test_a_cache_by_hand_takes_as_long_as_its_slowest_thread() -> None:
    """A row is 1,024 B of features, 16 of positions, 768 of pixels, 20 of the crop, 48 of moments."""
    _, one, three = predict(toy(), PROFILE, IMAGES)
    assert one.cache_seconds == pytest.approx(3.0 + 2 * IMAGES * 1876 / 1e6), "writing at 1 MB/s bounds"
    fast = replace(PROFILE, write_rate=1e12)
    assert predict(toy(), fast, IMAGES)[1].cache_seconds == pytest.approx(3 + 2 * IMAGES * 0.002 / 2), "two load"
    assert predict(toy(), fast, IMAGES)[2].cache_seconds == pytest.approx(3 + 2 * IMAGES * (1876 / 2e6 + 512 / 2e6) / 2)
    free = replace(fast, read_rate=1e12, crop_seconds=1e-9)
    assert predict(toy(), free, IMAGES)[1].cache_seconds == pytest.approx(3 + 2 * IMAGES * 512 / 1e6), "rounding"
    round_free = replace(free, codecs=tuple(replace(one, round=1e9, restore=1e9) for one in PROFILE.codecs))
    forward = EMBEDDING / 5e8 + 4 * BLOCK / 2e9
    assert predict(toy(), round_free, IMAGES)[1].cache_seconds == pytest.approx(3 + 2 * IMAGES * forward, rel=1e-4)
    blocks = 2 * 4 * BLOCK / 2e9
    assert predict(toy(), round_free, IMAGES)[2].cache_seconds == pytest.approx(3 + 2 * IMAGES * blocks, rel=1e-4)
    assert three.build_memory_bytes == 2 * 40 * (16 * 32 * 4 + 768), "two shards of float32 features and pixels"


def test_on_a_cpu_all_threads_share_the_cores() -> None:
    cpu = replace(PROFILE, cores=2, busy_cores=2)
    forward = EMBEDDING / 5e8 + 4 * BLOCK / 2e9
    threads = 0.002 + 512 / 1e6 + 1876 / 1e6
    assert predict(toy(), cpu, IMAGES)[1].cache_seconds == pytest.approx(3 + 2 * IMAGES * (2 * forward + threads) / 2)
    live = step(4, 2 * EMBEDDING / 5e8, embedding=48 * 32)
    assert predict(toy(), cpu, IMAGES)[0].e2e_seconds == pytest.approx(STEPS * (live + 16 * 0.002 / 2))
    assert beside(cpu, 1.0, [(0.5, 1), (3.0, 1)]) == 3.0 and beside(cpu, 1.0, [(0.5, 1)]) == 1.25
    assert beside(PROFILE, 1.0, [(6.0, 9)]) == 1.5, "no more threads than cores"


def test_slow_images_bound_a_step_and_it_is_told() -> None:
    slow = replace(PROFILE, crop_seconds=0.02)
    costs = predict(toy(**{"train.loader_threads": 1}), slow, IMAGES)
    assert costs[0].e2e_seconds == pytest.approx(STEPS * 16 * 0.02) and costs[0].waits == ("e2e", "freeze", "cached")
    assert costs[1].waits == ("e2e", "freeze") and predict(toy(), PROFILE, IMAGES)[1].waits == ()
    recut = predict(toy(**{"train.loader_threads": 1, "cache.pixels": "recut"}), slow, IMAGES)
    assert recut[1].waits == ("e2e", "freeze", "cached"), "cutting again costs as much as cutting"


def test_a_slow_disk_bounds_what_reads_a_cache_however_many_threads() -> None:
    slow = replace(PROFILE, disk_rate=1e5)
    costs = predict(toy(**{"train.loader_threads": 4}), slow, IMAGES)
    assert costs[1].cached_seconds == pytest.approx(STEPS * 16 * (256 + 4 + 768 + 20 + 48) / 1e5)
    assert costs[1].waits == ("cached",) and costs[1].e2e_seconds == predict(toy(), PROFILE, IMAGES)[1].e2e_seconds
    assert costs[2].cache_seconds == pytest.approx(3 + 2 * IMAGES * 1876 / 1e5), "its parent is read whole"


def test_compiling_counts_its_start_up() -> None:
    plain, compiled = (predict(toy(**{"train.compile": kind}), PROFILE, IMAGES) for kind in ("off", "on"))
    for stage, cut in enumerate((0, 1, 3)):
        start = 5.0 * (4 - cut)
        assert compiled[stage].cached_seconds == pytest.approx(start + plain[stage].cached_seconds / 2)
    many = predict(toy(**{"train.compile": "auto"}), PROFILE, 16 * 5000)
    assert many[0].e2e_seconds == pytest.approx(20 + 2500 * step(4, 2 * EMBEDDING / 5e8, embedding=48 * 32))
    dropped = {"train.compile": "auto", "train.drop_path": 0.1}
    assert predict(toy(**dropped), PROFILE, 16 * 5000)[0].e2e_seconds == pytest.approx(2 * (many[0].e2e_seconds - 20))


def test_methods_that_cost_more_are_priced_as_such() -> None:
    plain = predict(toy(), PROFILE, IMAGES)
    heads = predict(toy(**{"heads.blocks": [2, 4]}), PROFILE, IMAGES)
    extra = 16 * 3 * DECODER / 5e8 + DECODER_PARAMETERS / 1e6
    assert heads[0].e2e_seconds - plain[0].e2e_seconds == pytest.approx(STEPS * extra)
    assert heads[2].cached_seconds == pytest.approx(plain[2].cached_seconds), "the head at block 2 is frozen there"
    ring = predict(toy(**{"cache.refresh": 1, "cache.views": 1}), PROFILE, IMAGES)
    assert ring[2].cache_seconds == pytest.approx(2 * (3 + IMAGES * 1876 / 1e6)), "the second of two epochs turns it"
    whole = predict(toy(**{"target.kind": "features"}), PROFILE, IMAGES)
    groups = EMBEDDING / 5e8 + 4 * BLOCK / 2e9
    assert whole[1].freeze_seconds == pytest.approx(STEPS * step(3, groups)), "all four groups pass the frozen block"
    ema = predict(toy(**{"target.kind": "teacher", "teacher.kind": "ema"}), PROFILE, IMAGES)
    assert ema[0].e2e_seconds > plain[0].e2e_seconds
    live = {"cache.over_budget": "live", "cache.budget_gb": 1e-6}
    run = predict(toy(**live), PROFILE, IMAGES)
    assert run[1].live and not run[1].cache_bytes and run[1].cached_seconds == pytest.approx(
        STEPS * step(3, EMBEDDING / 5e8 + BLOCK / 2e9)
    )


def test_the_run_as_a_whole_by_hand() -> None:
    costs = [
        StageCost(0, 0, 2.0, "planned", 20, 20, 20, 0, 0),
        StageCost(1, 3, 4.0, "planned", 40, 32, 16, 12, 100, e2e_memory_bytes=7, cached_memory_bytes=5),
    ]
    found = totals(costs)
    assert (found["e2e_seconds"], found["freeze_seconds"], found["cached_seconds"]) == (60, 52, 48)
    assert found["speedup_total"] == 1.25 and found["cache_bytes"] == 100
    assert found["break_even_epoch"] == pytest.approx(2 + 4 / 2), "12 s of lead, 10 against 4 s an epoch: 2 epochs"
    assert found["memory_bytes"] == {"e2e": 7, "freeze": 0, "cached": 5}
    told = costs[1].to_dict(PROFILE)
    assert told["cached_money"] == pytest.approx(28 / 3600 * 3.6) and told["e2e_money"] == pytest.approx(0.04)
    assert "e2e_money" not in costs[1].to_dict(replace(PROFILE, price_per_hour=0.0))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "tokens"), [("plain", 9), ("fused", 15)])
def test_a_block_keeps_what_autograd_keeps(precision: str, kind: str, tokens: int) -> None:
    model = ModelConfig(image_size=16, patch_size=4, width=64, heads=2, depth=2)
    encoder = build_encoder(model, 0).train()
    use_attention(encoder.vit.blocks, kind, "cpu", tokens)
    own = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own and tensor.numel() % (8 * tokens) == 0:  # weights that autocast has copied are no multiple
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast("cpu", precision):
        encoder.run(torch.randn(8, tokens, 64, requires_grad=True), 0, 2)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / 2 / 8
    assert block_bytes(tokens, 64, 2, precision, "cpu", kind) == pytest.approx(found, rel=0.08)


def test_the_peak_of_a_step_by_hand() -> None:
    run = on_paper(toy(**{"train.accumulate": 4}), IMAGES)
    block = 4 * 32 * 64 + 2 * 4 * 4 * 4  # plain attention on a CPU keeps two heads' softmax
    decoder = 16 * 16 * 64 + 2 * 16 * 16 * 4
    image = 3 * block + decoder + 16 * (48 + 32) * 4
    weights, learning = 4 * 12 * 32**2, 3 * 12 * 32**2 + 12 * 16**2
    batch = 16 * (4 * 32 * 4 + 768)
    want = 4 * weights + 16 * learning + 4 * image + 5 * batch
    assert peak_bytes(run, 1, run.parts(1)[0], "cached") == want, "four micro-batches, one batch and four ahead"
    assert peak_bytes(run, 1, run.parts(1)[0], "freeze") < want


# --- what is measured -------------------------------------------------------------------------------------------------


def test_the_pace_of_a_build_is_that_after_its_first_shard() -> None:
    built = paced(300, 10.0, [(100, 4.0), (200, 6.0), (300, 9.0)])
    assert built == Built(300, 10.0, 0.025) and built.start == pytest.approx(2.5)
    assert built.total(300) == 10.0 and built.total(700) == pytest.approx(20.0)
    assert paced(50, 2.0, [(50, 2.0)]).row_seconds == 0.04, "one shard: no start is known"
    assert paced(30, 3.0, [(10, 1.0), (20, 9.0), (30, 17.0)]).total(60) == pytest.approx(6.0), "never above its whole"


# --- plans for what is not here ---------------------------------------------------------------------------------------


def test_a_plan_for_images_and_a_device_that_are_not_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, root = tmp_path / "paper.toml", tmp_path / "toy"
    file.write_text(to_toml(PROFILE))
    config = toy(**{"data.source": str(tmp_path / "nothing-there")})
    costs.show_plan(job(root, config, images=IMAGES, device_profile=str(file)))
    out = " ".join(capsys.readouterr().out.split())
    plan = json.loads((root / f"plan-paper-{IMAGES}.json").read_text())
    assert not (root / "plan.json").exists() and plan["images"] == IMAGES
    want = predict(costs.on_device(config, PROFILE), PROFILE, IMAGES)
    assert [stage["cached_seconds"] for stage in plan["stages"]] == [cost.cached_seconds for cost in want]
    assert plan["money"]["e2e"] == pytest.approx(plan["e2e_seconds"] / 1000) and "money at 3.6 USD an hour" in out
    assert "assumed: Round numbers." in out and "9,600 images on paper: a machine on paper (assumed)" in out
    assert plan["disk_peak_bytes"] == plan["cache_bytes"] and plan["profile"] == PROFILE.to_dict()
    assert plan["codecs"]["int8"] < plan["codecs"]["float16"] == plan["cache_bytes"]
    assert "as set" in out and "mask.groups=1 leaks: visible features" in out and "1 (leaks)" in out
    row = next(row for row in plan["advice"]["settings"] if row["why"] == "as set")
    assert row["seconds"] == pytest.approx(plan["cached_seconds"])
    assert "train.max_steps" not in out
    costs.show_plan(job(root, toy(**{"train.max_steps": 1}), images=IMAGES, device_profile=str(file)))
    assert "assumed: train.max_steps = 1 ends stages before their epochs do" in capsys.readouterr().out


def test_twice_the_images_take_twice_the_steps_and_rows() -> None:
    a100 = read_profile("a100-80gb")
    once, twice = (predict(toy(), a100, count) for count in (IMAGES, 2 * IMAGES))
    for one, two in zip(once, twice, strict=True):
        assert two.e2e_seconds == pytest.approx(2 * one.e2e_seconds)
        assert two.cache_seconds - a100.start_seconds * bool(two.cut) == pytest.approx(
            2 * (one.cache_seconds - a100.start_seconds * bool(one.cut))
        )
    assert sum(cost.cache_seconds for cost in once) > 0


def test_this_machine_is_measured_without_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = toy(**{"data.source": str(tmp_path / "nothing-there")})
    costs.show_plan(job(tmp_path / "toy", config, images=500))
    plan = json.loads((tmp_path / "toy" / "plan-here-500.json").read_text())
    assert plan["profile"]["origin"] == "measured" and "JPEGs of 500 x 375" in " ".join(plan["profile"]["assumptions"])
    assert [stage["state"] for stage in plan["stages"]] == ["planned"] * 3
    assert all(stage["e2e_seconds"] > 0 for stage in plan["stages"]) and "money" not in plan
    assert [path.name for path in (tmp_path / "toy").iterdir()] == ["plan-here-500.json"], "nothing else is left"
    run = on_paper(config, 500)
    profile = read_profile(str(tmp_path / "toy" / "plan-here-500.json"))
    again = stage_costs(run, OnProfile(run, profile))
    assert [cost.e2e_seconds for cost in again] == [stage["e2e_seconds"] for stage in plan["stages"]], "the same code"


def test_a_row_is_counted_as_the_layout_has_it() -> None:
    run = on_paper(toy(), IMAGES)
    layout = run.layout(run.features(1))
    assert row_bytes(layout) == 1024 + 16 + 768 + 20 + 48
    assert row_bytes(layout, 0.25) == 256 + 4 + 768 + 20 + 48


def test_steps_under_a_mask_that_changes_are_timed_by_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a fixed ratio e2e takes as long in every stage, and is timed once."""
    timed: list[tuple[int, int]] = []
    monkeypatch.setattr(
        rehearse, "live_seconds", lambda wanted, stage, part, arm: timed.append((stage, part.first_step)) or 1.0
    )
    for changes, times in (({}, 1), ({"mask.ratio_end": 0.9}, 2)):
        wanted = Wanted(toy(**changes), RunPaths(tmp_path))
        prices = rehearse.Rehearsed(wanted, PROFILE, {})
        timed.clear()
        for stage, part in enumerate(wanted.arm_segments("e2e")):
            prices.compute(stage, part, "e2e")
        assert len(timed) == times
