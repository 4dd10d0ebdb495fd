"""A whole run at toy size: every stage, both baselines, the comparison; then what happens when something changes, stops
or breaks. One finished run serves all tests that only read it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cache import open_cache
from cache.errors import DamagedCache
from pipeline import care, equivalence, runner, speedup
from pipeline.config import ConfigError, PipelineConfig
from pipeline.decide import Wanted, judge_all, judge_cache, judge_stage
from pipeline.job import Interrupted, RunFailed
from pipeline.layout import RunBusy, RunPaths
from tests.pipeline.toy import StopAfter, job, record, same, toy, weights, without_last_checksums


def test_records_and_comparison_hold_what_the_contract_names(finished: Path) -> None:
    names = {
        *("stage", "status", "fingerprint", "parent", "cut", "epochs", "steps", "train_seconds", "cache_seconds"),
        *("loader_wait_seconds", "images_per_second", "final_loss", "knn_top1", "linear_top1"),
    }
    for k, (cut, steps) in enumerate([(0, 6), (1, 6), (3, 12)]):
        found = record(finished, f"stage-{k}")
        assert names <= found.keys() and found["status"] == "done"
        assert (found["cut"], found["steps"], found["images"]) == (cut, steps, 16 * steps)
        assert found["parent"] == (record(finished, f"stage-{k - 1}")["fingerprint"] if k else None)
    found = json.loads((finished / "speedup.json").read_text())
    for arm in ("e2e", "freeze", "cached"):
        one = found["arms"][arm]
        assert one["images"] == 16 * 24 and one["epochs"] == 4
        assert one["total_seconds"] == pytest.approx(one["train_seconds"] + one["cache_seconds"])
        assert [point["epoch"] for point in one["curve"]] == [1, 2, 4]
        assert [p["seconds"] for p in one["curve"]] == sorted(p["seconds"] for p in one["curve"])
    assert found["arms"]["cached"]["cache_seconds"] > 0 == found["arms"]["e2e"]["cache_seconds"]
    total = found["arms"]["e2e"]["total_seconds"] / found["arms"]["cached"]["total_seconds"]
    assert found["speedup_total"] == pytest.approx(total)
    assert [row["cut"] for row in found["speedup_by_stage"]] == [1, 3]
    assert all(row["flop_bound"] > 1 for row in found["speedup_by_stage"])
    assert (finished / "figures" / "accuracy-time.png").read_bytes().startswith(b"\x89PNG")


def test_events_are_json_lines_with_the_contract_s_keys(finished: Path) -> None:
    events = [json.loads(line) for line in (finished / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if "loss" in event]
    keys = {"time", "step", "epoch", "images", "loss", "lr", "images_per_second", "loader_wait_fraction"}
    assert steps and all(keys <= event.keys() and ("stage" in event) != ("arm" in event) for event in steps)


def test_frozen_blocks_keep_their_bits_and_the_others_learn(finished: Path) -> None:
    before, one, two = (weights(finished, f"stage-{k}") for k in range(3))
    assert same(before, one, "patch_embed.") and same(before, one, "blocks.0.") and same(one, two, "blocks.2.")
    assert not same(before, one, "blocks.1.") and not same(one, two, "blocks.3.")
    freeze, e2e = weights(finished, "arms/freeze"), weights(finished, "arms/e2e")
    assert same(before, freeze, "blocks.0.") and not same(before, e2e, "blocks.0.")
    assert not same(before, e2e, "patch_embed.")


def test_features_cost_two_bytes_a_value(finished: Path) -> None:
    for folder in (finished / "cache").glob("cut-*"):
        files = [f for f in folder.rglob("*") if f.is_file() and "/features/c/" in f.as_posix()]
        values = 96 * 2 * 16 * 32
        assert (
            values * 2 <= sum(f.stat().st_size for f in files) <= values * 2 * 1.6
        )  # toy rows are tiny, indexes are not


def test_second_call_changes_nothing_and_does_not_load_torch(copy: Path) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in copy.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }
    code = (
        "import sys; from pipeline.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ('torch loaded' if 'torch' in sys.modules else 0))"
    )
    args = ["stage", "2", "--config", str(copy / "config.toml"), "--run", str(copy)]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stage 2: current" in done.stdout
    after = {
        path: path.stat().st_mtime_ns
        for path in copy.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }
    assert after == before


@pytest.mark.parametrize("asked", [1, 5, 13, 21])
def test_interrupted_anywhere_ends_with_the_same_bits(finished: Path, tmp_path: Path, asked: int) -> None:
    root = tmp_path / "toy"
    with pytest.raises(Interrupted, match="goes on from there"):
        runner.run_stage(job(root, target=2, stop=StopAfter(asked)))
    runner.run_stage(job(root, target=2))
    for stage in ("stage-0", "stage-1", "stage-2"):
        assert same(weights(finished, stage), weights(root, stage))
        for key in ("final_loss", "first_loss", "knn_top1", "linear_top1", "steps", "images"):
            assert record(finished, stage)[key] == record(root, stage)[key], key


@pytest.mark.slow
@pytest.mark.parametrize(
    "wait_for", ["stage-0/last/state.safetensors", "cache/*/receipts/*", "stage-2/last/state.safetensors"]
)
def test_killed_anywhere_ends_with_the_same_bits(finished: Path, tmp_path: Path, wait_for: str) -> None:
    root = tmp_path / "toy"
    root.mkdir()
    changed = root.parent / "toy.toml"
    changed.write_text((finished / "config.toml").read_text().replace("save_every = 20.0", "save_every = 0.01"))
    command = [sys.executable, "-m", "pipeline", "stage", "2", "--config", str(changed), "--run", str(root)]
    process, deadline = subprocess.Popen(command, stdout=subprocess.DEVNULL), time.monotonic() + 300
    while process.poll() is None and not list(root.glob(wait_for)) and time.monotonic() < deadline:
        threading.Event().wait(0.005)
    process.kill()
    process.wait(60)
    assert time.monotonic() < deadline, "it has not come so far"
    assert subprocess.run(command, stdout=subprocess.DEVNULL, timeout=300).returncode == 0
    assert same(weights(finished, "stage-2"), weights(root, "stage-2"))


def test_cached_and_live_loss_agree(finished: Path) -> None:
    wanted = Wanted(toy(), RunPaths(finished))
    for stage in (1, 2):
        found = equivalence.compare_stage(wanted, stage)
        assert found.loss_difference < 1e-4 and 0 < found.feature_rmse < 5e-4
    equivalence.run_equivalence(job(finished))


def test_equivalence_is_not_misled_by_branches_dropped_at_random(tmp_path: Path) -> None:
    config = toy(**{"train.drop_path": 0.5, "eval.train_limit": 20, "eval.val_limit": 20})
    runner.run_stage(job(tmp_path / "toy", config, target=1))
    assert equivalence.compare_stage(Wanted(config, RunPaths(tmp_path / "toy")), 1).loss_difference < 1e-4


def test_equivalence_sees_a_cache_of_other_weights(copy: Path) -> None:
    wanted = Wanted(toy(), RunPaths(copy))
    first, second = (wanted.cache_folder(wanted.cache_spec(stage)) for stage in (1, 2))
    for source in (second / "data.zarr" / "view_0" / "features" / "c").rglob("*"):
        if source.is_file():
            shutil.copy(source, first / source.relative_to(second))
            shutil.copy(source, first / str(source.relative_to(second)).replace("view_0", "view_1"))
    with pytest.raises(DamagedCache, match="is not the shard that was written there"):
        equivalence.run_equivalence(job(copy))
    without_last_checksums(first)
    with pytest.raises(RunFailed, match="cache 1 is not what the frozen blocks compute"):
        equivalence.run_equivalence(job(copy))
    with pytest.raises(RunFailed, match="damaged"):
        care.run_verify(job(copy))


def test_changed_setting_is_named_and_makes_stale_what_it_touches(finished: Path) -> None:
    def states(config: PipelineConfig) -> dict[str, str]:
        return {v.what: f"{v.state} {v.reason}" for v in judge_all(Wanted(config, RunPaths(finished)))}

    assert all(state.startswith("current") for state in states(toy()).values())
    slower = states(toy(**{"train.lr": 0.002}))
    assert slower["stage 0"] == "stale train.lr: 0.001 -> 0.002"
    assert slower["stage 2"].startswith("stale") and slower["arm e2e"].startswith("stale")
    quick = states(toy(**{"train.prefetch": 7, "train.loader_threads": 1, "cache.shard_rows": 64, "eval.knn_k": 5}))
    assert all(state.startswith("current") for state in quick.values())
    views = states(toy(**{"cache.views": 3}))
    assert views["stage 0"].startswith("current") and views["arm e2e"].startswith("current")
    assert views["stage 1"] == "stale cache.views: 2 -> 3" and "views=2" in views["cache 1"]
    assert states(toy(seed=1))["stage 0"] == "stale seed: 0 -> 1"


def test_retrained_weights_make_the_cache_stale_and_named(copy: Path) -> None:
    stage = record(copy, "stage-0")
    stage["frozen_weights"]["1"] = "0" * 64
    (copy / "stage-0" / "stage.json").write_text(json.dumps(stage))
    wanted = Wanted(toy(), RunPaths(copy))
    verdict = judge_cache(wanted, wanted.features(1))
    assert verdict.state == "stale" and "weights=" in verdict.reason


def test_flipped_byte_is_refused_found_and_mended_bit_for_bit(copy: Path, finished: Path) -> None:
    wanted = Wanted(toy(), RunPaths(copy))
    folder = wanted.cache_folder(wanted.cache_spec(2))
    victim = folder / "data.zarr/view_1/features/c/1/0/0"
    good = victim.read_bytes()
    victim.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(DamagedCache, match="make repair"):
        open_cache(folder).read(range(40, 80), view=1)
    with pytest.raises(RunFailed, match="1 damaged files"):
        care.run_verify(job(copy))
    others = {f: f.stat().st_mtime_ns for f in folder.rglob("c/*/0*") if f.is_file() and "/c/1/" not in f.as_posix()}
    care.run_repair(job(copy))
    assert victim.read_bytes() == good
    assert {f: f.stat().st_mtime_ns for f in others} == others
    care.run_verify(job(copy))


def test_deleted_shard_and_altered_state_are_refused(copy: Path) -> None:
    wanted = Wanted(toy(), RunPaths(copy))
    folder = wanted.cache_folder(wanted.cache_spec(1))
    (folder / "data.zarr/view_1/features/c/0/0/0").unlink()
    (copy / "stage-1" / "stage.json").unlink()
    shutil.rmtree(copy / "stage-1" / "last")
    with pytest.raises(DamagedCache, match="make repair"):
        runner.run_stage(job(copy, target=1))
    state = copy / "stage-0" / "last" / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[-3] ^= 1
    state.write_bytes(content)
    with pytest.raises(ValueError, match="is not the state that its stage ended with"):
        runner.run_stage(job(copy, target=1))


def test_only_what_is_missing_runs(copy: Path) -> None:
    shutil.rmtree(copy / "stage-2")
    kept = {name: (copy / name / "stage.json").stat().st_mtime_ns for name in ("stage-0", "stage-1", "arms/e2e")}
    manifests = {path: path.stat().st_mtime_ns for path in copy.glob("cache/*/manifest.json")}
    runner.run_stage(job(copy, target=2))
    assert {name: (copy / name / "stage.json").stat().st_mtime_ns for name in kept} == kept
    assert {path: path.stat().st_mtime_ns for path in manifests} == manifests
    assert judge_stage(Wanted(toy(), RunPaths(copy)), 2).current


def test_caches_that_nothing_needs_are_removed_and_only_those(copy: Path) -> None:
    wanted = Wanted(toy(), RunPaths(copy))
    kept = {wanted.cache_folder(wanted.cache_spec(stage)) for stage in (1, 2)}
    stray = shutil.copytree(next(iter(kept)), copy / "cache" / "cut-9-00000000")
    care.run_gc(job(copy, yes=True))
    assert not stray.exists() and all(folder.exists() for folder in kept)


def test_views_that_do_not_fit_the_disk_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"need [\d,.]+ GB, .* has [\d,.]+ GB free; lower cache.views"):
        runner.run_stage(job(tmp_path / "toy", toy(**{"cache.views": 10_000_000}), target=2))
    assert not (tmp_path / "toy" / "stage-0").exists()


def test_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    first = job(tmp_path / "toy", target=0)
    with first.paths.lock(), pytest.raises(RunBusy, match="in use by process"):
        runner.run_stage(first)


def test_original_full_mode_trains_on_feature_targets(tmp_path: Path) -> None:
    config = replace(toy(), mask=replace(toy().mask, groups=1), target=replace(toy().target, kind="features"))
    runner.run_all(job(tmp_path / "toy", config))
    found = json.loads((tmp_path / "toy" / "speedup.json").read_text())
    assert found["arms"]["freeze"]["images"] == found["arms"]["cached"]["images"]
    reader = open_cache(next((tmp_path / "toy" / "cache").glob("cut-3-*")))
    assert reader.read([0]).pixels_BLP is None and reader.manifest.spec.groups == 1


def test_break_even_is_where_the_courses_cross_for_good() -> None:
    slow = [(0.0, 0.0), (2.0, 20.0), (4.0, 40.0)]
    fast = [(0.0, 0.0), (2.0, 20.0), (2.0, 26.0), (4.0, 34.0)]  # 6 s for a cache, then 4 s an epoch where e2e takes 10
    assert speedup.break_even(slow, fast) == pytest.approx(3.0)
    assert speedup.break_even(slow, [(0.0, 0.0), (2.0, 20.0), (2.0, 60.0), (4.0, 68.0)]) is None
    assert speedup.break_even(slow, slow) == 0.0
    assert speedup.stopped_at(
        [
            {"seconds": 10, "epoch": 1, "knn_top1": 0.2, "linear_top1": 0.4},
            {"seconds": 20, "epoch": 2, "knn_top1": 0.4, "linear_top1": 0.4},
        ],
        15,
    ) == {"seconds": 15, "epoch": 1.5, "knn_top1": pytest.approx(0.3), "linear_top1": pytest.approx(0.4)}
