"""Self-distillation in a whole run: the frozen teacher's features computed once and cached, an average that follows the
student, and what makes either stale."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cache import open_cache
from cache.size import cache_bytes
from models.batch import MaskedBatch
from models.config import TeacherConfig
from models.mim import MaskedModel
from models.targets import feature_target
from models.teacher import EmaTeacher
from models.vit import build_encoder
from pipeline import care, equivalence, runner
from pipeline.checks import check
from pipeline.config import ConfigError, PipelineConfig
from pipeline.decide import Wanted, judge_all
from pipeline.feeds import cached_source, live_source
from pipeline.job import Interrupted, RunFailed
from pipeline.layout import RunPaths
from pipeline.work import masked_build
from stages.checkpoint import apply_tensors, read_state
from stages.optim import build_adamw, parameter_groups
from stages.train import build_model
from tests.pipeline.toy import StopAfter, job, record, same, toy, weights, without_last_checksums

HEADS = {"heads.blocks": [2, 4], "target.kind": "teacher"}
FROZEN = HEADS | {"teacher.pairs": "same"}
EMA = {"target.kind": "teacher", "teacher.kind": "ema", "teacher.momentum": 0.9}


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "toy"
    runner.run_all(job(root, toy(**FROZEN)))
    return root


@pytest.fixture(scope="module")
def ema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "toy"
    runner.run_all(job(root, toy(**EMA)))
    return root


@pytest.fixture
def copied(frozen: Path, tmp_path: Path) -> Path:
    return shutil.copytree(frozen, tmp_path / "toy")


def wanted(root: Path, changes: dict, **more: object) -> Wanted:
    return Wanted(toy(**changes, **more), RunPaths(root))


def states(root: Path, config: PipelineConfig) -> dict[str, str]:
    return {v.what: f"{v.state} {v.reason}" for v in judge_all(Wanted(config, RunPaths(root)))}


def model_at(run: Wanted, stage: int, cached: bool) -> MaskedModel:
    """The model with which a stage starts."""
    model = build_model(masked_build(run, stage, cached), run.segments[stage].cut, "cpu")
    state = read_state(run.paths.stage(stage - 1).last / "state.safetensors")[2]
    apply_tensors(model, build_adamw(parameter_groups(model, 0.0), run.config.train), state)
    return model


def first_batch(run: Wanted, stage: int, model: MaskedModel) -> MaskedBatch:
    source = cached_source(run, stage)
    return source.mask(model, source.load(run.segments[stage], 0))


# --- frozen -----------------------------------------------------------------------------------------------------------


def test_the_frozen_teacher_is_cached_once_for_all_stages(frozen: Path) -> None:
    run = wanted(frozen, FROZEN)
    two, four = (run.spec(need) for need in run.teachers(1))
    assert two is not None and four is not None and run.teachers(2) == run.teachers(1)[1:]  # head 2 is frozen by then
    hashes = record(frozen, "stage-0")["frozen_weights"]
    assert (two.cut, two.weights, two.parent) == (2, hashes["2"], "")
    assert (four.cut, four.weights, four.parent) == (4, hashes["4"], two.fingerprint)
    for spec in (two, four):
        manifest = open_cache(run.cache_folder(spec)).manifest
        assert manifest.spec == spec and (spec.groups, spec.pixels, spec.views) == (1, False, 2)
    assert len(list((frozen / "cache").glob("cut-*"))) == 4
    spent = json.loads((frozen / "stage-1" / "cache.json").read_text())
    assert {two.fingerprint, four.fingerprint} < spent.keys() and len(spent) == 3
    assert record(frozen, "stage-1")["cache_seconds"] == pytest.approx(sum(spent.values()))
    assert len(json.loads((frozen / "stage-2" / "cache.json").read_text())) == 1


def test_explain_names_the_teacher_s_caches(frozen: Path) -> None:
    found = states(frozen, toy(**FROZEN))
    assert list(found)[:5] == ["stage 0", "cache 1", "cache teacher-2", "cache teacher-4", "stage 1"]
    assert all(state.startswith("current") for state in found.values())


def test_cached_and_live_targets_are_the_same_to_float16(frozen: Path) -> None:
    run = wanted(frozen, FROZEN)
    encoder = build_encoder(run.config.model, 1)
    encoder.vit.load_state_dict(load_file(frozen / "stage-0" / "model.safetensors"))
    batch = first_batch(run, 1, model_at(run, 1, cached=True))
    how, segment = cached_source(run, 1).sampling, run.segments[1]
    rows = how.rows(segment, 0, len(run.data.train))
    images, _ = how.views(run.data.train, rows, how.slot(segment, 0, 2)[0])
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = encoder.vit.patch_embed((images.float() / 255 - mean) / std) + encoder.vit.pos_embed
        for number, block in enumerate(encoder.vit.blocks, start=1):
            tokens = block(tokens)
            if number in (2, 4):
                # float16 keeps 11 bits of values of about 4, the largest here
                target = batch.targets[f"teacher{number}", 1.0]
                torch.testing.assert_close(target, feature_target(tokens), rtol=0, atol=6e-3)
                live = model_at(run, 1, cached=False).seen_in_images(images)[f"teacher{number}", 1.0]
                torch.testing.assert_close(live, feature_target(tokens), rtol=1e-4, atol=1e-4)


def test_the_teacher_s_rows_are_those_of_the_step_whatever_the_order_of_the_student_s_tokens(frozen: Path) -> None:
    run = wanted(frozen, FROZEN)
    source, segment, model = cached_source(run, 1), run.segments[1], model_at(run, 1, cached=True)
    views = [source.load(segment, step) for step in range(0, segment.steps)]
    for step, inputs in enumerate(views):
        rows, view = source.sampling.rows(segment, step, 96), source.sampling.slot(segment, step, 2)[0]
        for block, cache in source.teachers.items():
            assert torch.equal(inputs.teachers[block], cache.read(rows, view).features_BLD)
            assert cache.read(rows, view).keys == source.cache.read(rows, view).keys
    inputs = views[0]
    assert inputs.ids_BL is not None
    turned = replace(inputs, values=inputs.values.flip(1), ids_BL=inputs.ids_BL.flip(1))
    one, other = source.mask(model, inputs), source.mask(model, turned)
    assert torch.equal(one.scored_BL, other.scored_BL)
    assert all(torch.equal(one.targets[key], other.targets[key]) for key in one.targets)
    torch.testing.assert_close(model(one), model(other), rtol=1e-5, atol=0)


def test_only_hidden_tokens_count(frozen: Path) -> None:
    run = wanted(frozen, FROZEN)
    model = model_at(run, 1, cached=True)
    batch = first_batch(run, 1, model)
    hidden = batch.mask.hidden
    assert torch.equal(batch.scored_BL, hidden) and float(hidden.sum()) == 16 * 12

    def loss(where: torch.Tensor) -> list[float]:
        targets = {key: value + where.unsqueeze(-1) for key, value in batch.targets.items()}
        return model(replace(batch, targets=targets)).tolist()

    assert loss(1 - hidden) == loss(torch.zeros_like(hidden)) != loss(hidden)


def test_stage_0_predicts_pixels_and_the_arms_run_the_teacher_live(frozen: Path) -> None:
    events = [json.loads(line) for line in (frozen / "events.jsonl").read_text().splitlines()]
    named = {
        part: next(event.keys() for event in reversed(events) if "loss" in event and event.get(kind) == value)
        for part, kind, value in (("0", "stage", 0), ("2", "stage", 2), ("e2e", "arm", "e2e"), ("fr", "arm", "freeze"))
    }
    assert {"loss_block2_pixels", "loss_block4_pixels"} < named["0"] and "target_std_teacher4" not in named["0"]
    assert {"loss_block2_teacher2", "loss_block4_teacher4", "target_std_teacher2"} < named["e2e"]
    assert "target_std_teacher4" in named["fr"] and "target_std_teacher4" in named["2"]
    assert "loss_block2_teacher2" not in named["2"]  # its block is frozen, it has one head left
    run = wanted(frozen, FROZEN)
    assert model_at(run, 1, cached=True).teacher is None
    model = model_at(run, 1, cached=False)
    assert model.teacher is not None and not any(p.requires_grad for p in model.teacher.encoder.parameters())
    images = live_source(run, replace(run.segments[1], cut=0)).load(run.segments[1], 0).values
    assert not any(target.requires_grad for target in model.seen_in_images(images).values())


@pytest.mark.parametrize(
    ("pairs", "blocks"), [("last", (4,)), ("earlier", (2,)), ("later", (4,)), ("same", (2, 4))]
)
def test_a_cache_for_each_block_that_a_head_needs(tmp_path: Path, pairs: str, blocks: tuple[int, ...]) -> None:
    run = wanted(tmp_path, HEADS, **{"teacher.pairs": pairs})
    assert [need.draft.cut for need in run.teachers(1)] == list(blocks)


def test_cached_and_live_training_agree_and_a_wrong_teacher_is_found(copied: Path) -> None:
    run = wanted(copied, FROZEN)
    assert all(equivalence.compare_stage(run, stage).loss_difference < 1e-3 for stage in (1, 2))
    equivalence.run_equivalence(job(copied, toy(**FROZEN)))
    two, four = (run.cache_folder(run.spec(need)) for need in run.teachers(1))  # type: ignore[arg-type]
    for shard in (two / "data.zarr").rglob("features/c/*/0/0"):
        shutil.copy(shard, four / shard.relative_to(two))
    without_last_checksums(four)
    with pytest.raises(RunFailed, match="not what the frozen blocks compute"):
        equivalence.run_equivalence(job(copied, toy(**FROZEN)))


def test_the_teacher_s_caches_are_verified_mended_kept_and_cleared_away(copied: Path, frozen: Path) -> None:
    run = wanted(copied, FROZEN)
    folder = run.cache_folder(run.spec(run.teachers(1)[1]))  # type: ignore[arg-type]
    victim = folder / "data.zarr/view_1/features/c/1/0/0"
    good = victim.read_bytes()
    victim.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(RunFailed, match="1 damaged files"):
        care.run_verify(job(copied, toy(**FROZEN)))
    care.run_repair(job(copied, toy(**FROZEN)))
    assert victim.read_bytes() == good
    care.run_gc(job(copied, toy(**FROZEN), yes=True))
    assert len(list((copied / "cache").glob("cut-*"))) == 4
    care.run_gc(job(copied, toy(**FROZEN | {"teacher.pairs": "later"}), yes=True))  # teacher-4 then comes from images
    assert {path.name[:5] for path in (copied / "cache").glob("cut-*")} == {"cut-1", "cut-3"}


def test_the_plan_knows_the_teacher_s_disk(frozen: Path) -> None:
    run = wanted(frozen, FROZEN)
    for need in run.needs(1):
        spec = run.spec(need)
        assert spec is not None
        written = sum(f.stat().st_size for f in run.cache_folder(spec).rglob("*") if f.is_file())
        assert cache_bytes(run.layout(need)) == pytest.approx(written, rel=0.06)
    from pipeline.gauge import measure_profile
    from pipeline.predict import stage_cost
    from pipeline.rehearse import rehearse

    prices = rehearse(run, measure_profile(run, run.paths.root, run.data.train, 1e9))
    cost = stage_cost(run, prices, 1)
    assert cost.cache_bytes == sum(cache_bytes(run.layout(need)) for need in run.needs(1)) and cost.cached_seconds > 0
    assert stage_cost(run, prices, 2).cache_bytes == cache_bytes(run.layout(run.features(2)))


def test_a_frozen_teacher_s_settings_make_stale_what_they_touch(frozen: Path) -> None:
    found = states(frozen, toy(**HEADS | {"teacher.block": 3}))
    assert found["stage 0"].startswith("current") and found["cache 1"].startswith("current")
    assert found["stage 1"] == "stale teacher.block: 0 -> 3, teacher.pairs: same -> last"
    assert found["cache teacher-3"].startswith("missing") and found["arm e2e"].startswith("stale teacher.block")
    assert "momentum" not in json.dumps(record(frozen, "stage-1")["inputs"])


# --- a moving average -------------------------------------------------------------------------------------------------


def test_the_average_teaches_from_the_first_step_and_is_saved(ema: Path) -> None:
    events = [json.loads(line) for line in (ema / "events.jsonl").read_text().splitlines()]
    first = next(event for event in events if "loss" in event)
    assert first["stage"] == 0 and 0 < first["target_std_teacher4"] <= 1
    assert not list((ema / "cache").glob("cut-4-*"))
    held = {
        stage: {n for n in read_state(ema / f"stage-{stage}/last/state.safetensors")[2] if n.startswith("teacher/")}
        for stage in range(3)
    }
    assert "teacher/patch_embed.proj.weight" in held[0] and "teacher/blocks.0.norm1.weight" not in held[1]
    assert held[2] == {name for name in held[0] if name.startswith(("teacher/blocks.3.", "teacher/norm."))}


def test_the_average_in_a_run_is_the_closed_form(tmp_path: Path) -> None:
    config = toy(**EMA | {"schedule.cuts": [0], "schedule.epochs": [1]})
    courses = []
    for stopped in range(1, 7):  # six optimiser steps, the state read after each
        stop = StopAfter(0)
        if stopped < 6:
            with pytest.raises(Interrupted):
                runner.run_stage(job(tmp_path / "toy", config, target=0, stop=stop))
        else:
            runner.run_stage(job(tmp_path / "toy", config, target=0))
        courses.append(read_state(tmp_path / "toy/stage-0/last/state.safetensors")[2])
    start = build_model(masked_build(Wanted(config, RunPaths(tmp_path)), 0, True), 0, "cpu").encoder.vit.state_dict()
    for name in ("blocks.0.attn.qkv.weight", "blocks.3.mlp.fc2.bias", "patch_embed.proj.weight"):
        steps = [course[f"encoder/{name}"].double() for course in courses]
        want = start[name].double() * 0.9**6 + sum(0.1 * 0.9 ** (5 - t) * step for t, step in enumerate(steps))
        torch.testing.assert_close(courses[-1][f"teacher/{name}"].double(), want, rtol=1e-5, atol=1e-7)


def test_a_cached_stage_runs_the_average_over_all_tokens_of_the_view(ema: Path) -> None:
    run = wanted(ema, EMA)
    model, source, segment = model_at(run, 2, cached=True), cached_source(run, 2), run.segments[2]
    inputs = source.load(segment, 0)
    assert inputs.values.shape == (16, 16, 32) and inputs.ids_BL is not None
    batch = source.mask(model, inputs)
    assert batch.visible_BKD.shape == (16, 4, 32)
    state = read_state(ema / "stage-1/last/state.safetensors")[2]
    average = build_encoder(run.config.model, 1)
    vit = {n.removeprefix("encoder/"): v for n, v in state.items() if n.startswith("encoder/")}
    average.vit.load_state_dict(vit | {n.removeprefix("teacher/"): v for n, v in state.items() if "teacher/" in n})
    raster = torch.empty_like(inputs.values)
    for sample in range(16):
        raster[sample, inputs.ids_BL[sample]] = inputs.values[sample]
    with torch.no_grad():
        want = feature_target(average.vit.blocks[3](raster))
    torch.testing.assert_close(batch.targets["teacher4", 1.0], want, rtol=1e-4, atol=1e-5)
    order = torch.randperm(16)
    assert isinstance(model.teacher, EmaTeacher)
    permuted = model.seen_in_features(inputs.values[:, order], inputs.ids_BL[:, order])
    torch.testing.assert_close(permuted["teacher4", 1.0], batch.targets["teacher4", 1.0])


def test_frozen_blocks_of_the_average_are_the_student_s(ema: Path) -> None:
    model = model_at(wanted(ema, EMA), 2, cached=True)
    assert isinstance(model.teacher, EmaTeacher)
    student, average = model.encoder.vit, model.teacher.encoder.vit
    assert average.blocks[2].mlp.fc1.weight is student.blocks[2].mlp.fc1.weight
    assert not torch.equal(average.blocks[3].mlp.fc1.weight, student.blocks[3].mlp.fc1.weight)
    assert same(weights(ema, "stage-0"), weights(ema, "stage-2"), "blocks.0.")


@pytest.mark.parametrize("asked", [3, 9, 15])
def test_interrupted_anywhere_an_average_goes_on_with_the_same_bits(ema: Path, tmp_path: Path, asked: int) -> None:
    root = tmp_path / "toy"
    with pytest.raises(Interrupted, match="goes on from there"):
        runner.run_stage(job(root, toy(**EMA), target=2, stop=StopAfter(asked)))
    runner.run_stage(job(root, toy(**EMA), target=2))
    for stage in range(3):
        file = f"stage-{stage}/last/state.safetensors"
        assert same(read_state(ema / file)[2], read_state(root / file)[2])


def test_an_arm_thaws_what_was_frozen_in_place_and_its_average_goes_on_from_the_student(tmp_path: Path) -> None:
    """FreezeOut: the embedding and block 0 freeze within stage 0, which keeps no average of them; e2e needs one."""
    root = tmp_path / "toy"
    when = {"schedule.kind": "freezeout", "schedule.t0": 0.3, "schedule.scale": "linear", "schedule.epochs": [6]}
    config = toy(**EMA | when | {"schedule.cuts": [0, 2], "train.warmup_epochs": 0.0})
    runner.run_arm(job(root, config, target="e2e"))
    assert [part["cut"] for part in record(root, "stage-0")["segments"]] == [0, 1]
    start, end = (read_state(root / name / "last/state.safetensors")[2] for name in ("stage-0", "arms/e2e"))
    assert "teacher/blocks.0.mlp.fc1.weight" not in start
    run = Wanted(config, RunPaths(root))
    model = build_model(masked_build(run, 1, cached=False), 0, "cpu")
    apply_tensors(model, build_adamw(parameter_groups(model, 0.0), config.train), start)
    assert isinstance(model.teacher, EmaTeacher)
    for name, value in model.teacher.state_dict().items():
        thawed = name.startswith(("patch_embed.", "blocks.0."))
        assert torch.equal(value, start[f"encoder/{name}" if thawed else f"teacher/{name}"]), name
    moved, held = end["encoder/blocks.0.mlp.fc1.weight"], start["encoder/blocks.0.mlp.fc1.weight"]
    assert 0 < (end["teacher/blocks.0.mlp.fc1.weight"] - held).norm() < (moved - held).norm(), "it follows from there"


def test_cached_and_live_training_agree_with_an_average(ema: Path) -> None:
    equivalence.run_equivalence(job(ema, toy(**EMA)))
    assert equivalence.compare_stage(wanted(ema, EMA), 2).loss_difference < 1e-3


def test_an_average_s_settings_make_every_stage_stale(ema: Path) -> None:
    found = states(ema, toy(**EMA | {"teacher.momentum": 0.99}))
    assert found["stage 0"] == "stale teacher.momentum: 0.9 -> 0.99"
    assert states(ema, toy(**EMA))["stage 0"].startswith("current")


def test_a_collapsed_target_is_told(tmp_path: Path) -> None:
    model = build_model(masked_build(wanted(tmp_path, EMA), 0, cached=True), 0, "cpu")
    assert model.watch_names == ("target_std_teacher4",)
    assert model.warning({"target_std_teacher4": 0.5}) == ""
    assert model.warning({"target_std_teacher4": 0.09}) == "collapsed: teacher4"
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    batch = model.from_images(images, torch.rand(2, 16), 4)
    alike = replace(batch, targets={("teacher4", 1.0): batch.targets["teacher4", 1.0][:1, :1].expand(2, 16, -1)})
    assert float(model.watch(alike)) == pytest.approx(0, abs=1e-6)
    sides = torch.tensor([1.0, -1.0]).repeat(8)[None, :, None].expand(2, 16, 32)
    assert float(model.watch(replace(batch, targets={("teacher4", 1.0): sides}))) == 1.0


def test_other_targets_have_no_teacher(finished: Path) -> None:
    run = Wanted(toy(), RunPaths(finished))
    assert run.teachers(1) == () and not any("teacher" in name for name in run.stage_inputs(1))
    assert model_at(run, 1, cached=False).teacher is None
    assert TeacherConfig() == run.config.teacher


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher.kind": "ema"}, "teacher.kind = ema teaches no head; set target.kind=teacher"),
        (HEADS | {"teacher.block": 5}, "teacher.block = 5 is more than the 4 blocks there are; use 0..4"),
        (FROZEN | {"teacher.block": 2}, "teacher.block = 2 is not asked for with teacher.pairs = same; set it to 0"),
        (HEADS | {"teacher.momentum": 0.5}, "teacher.momentum = 0.5 moves nothing with teacher.kind = frozen; use ema"),
        (EMA | {"teacher.momentum": 1.5}, "teacher.momentum = 1.5 is outside [0, 1]; choose a value inside"),
        (
            HEADS | {"schedule.cuts": [0], "schedule.epochs": [1]},
            "teacher.kind = frozen is what stage 0 ends with, but schedule.cuts = [0] ends there; use ema",
        ),
        (
            HEADS | {"heads.scales": [2, 1]},
            "heads.scales has 2.0 for a head of teacher, which are there for tokens only; use scale 1 for it",
        ),
        ({"train.drop_path": 1}, "train.drop_path = 1.0 is outside [0, 1); choose a value inside"),
        ({"train.layer_drop": 1}, "train.layer_drop = 1.0 is outside [0, 1); choose a value inside"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(toy(**changes))
    assert str(refused.value) == message


def test_heads_of_other_targets_are_left_out_of_the_pairs() -> None:
    changes = {"heads.blocks": [1, 2, 4], "heads.targets": ["teacher", "hog", "teacher"], "teacher.pairs": "earlier"}
    heads = Wanted(toy(**changes), RunPaths(Path("nowhere"))).heads
    assert [(head.name, head.teacher) for head in heads] == [
        ("block1_teacher1", 1),
        ("block2_hog", 0),
        ("block4_teacher1", 1),
    ]
