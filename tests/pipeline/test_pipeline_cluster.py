"""Builds on clusters whose parts fail: every one ends in the cache that a build in this process makes, file by file."""

from __future__ import annotations

import gc
import os
import re
import shutil
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import PIL
import pytest
from safetensors.torch import save_file

from cache.errors import CacheError, MissingCache
from cache.layout import Layout
from cache.verify import verify_cache
from models.config import ModelConfig
from models.vit import ALL, build_encoder, frozen_hash
from pipeline import tasks
from pipeline.cluster import chosen, on_gpus, task_runner
from pipeline.config import ClusterConfig, ConfigError
from pipeline.job import RunFailed
from stages import carried
from stages.config import DataConfig, EvalConfig
from stages.encode import EncodeJob, build, encode_shard
from stages.images import open_data
from stages.mend import mend
from stages.scores import features, score
from stages.spread import spread_features
from tests.encoding import encode_job, tiny_spec
from tests.pipeline import workers
from tests.pipeline.workers import cluster_of, files, instead, until

MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=4, heads=2)
DATA = DataConfig(limit=24)
IMAGES = open_data(DATA).train
ENCODER = build_encoder(MODEL, seed=3)
CUT, SHARDS = 2, 12


def job(folder: Path, weights: str) -> EncodeJob:
    spec = tiny_spec(IMAGES, DATA, frozen_hash(ENCODER.vit.state_dict(), CUT), CUT)
    return encode_job(folder, Layout(spec, len(IMAGES), shard_rows=4), MODEL, DATA, weights, batch=4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(ENCODER.vit.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def straight(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the cache as one worker inside this process makes it."""
    one = job(tmp_path_factory.mktemp("straight") / "cache", str(weights))
    with task_runner(ClusterConfig(), "cpu") as run:
        assert list(build(one, IMAGES, run))[-1] == (SHARDS, SHARDS)
    return files(Path(one.folder))


@pytest.fixture
def one(tmp_path: Path, weights: Path) -> EncodeJob:
    return job(tmp_path / "cache", str(weights))


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_a_task_costs_its_task(
    tmp_path: Path, one: EncodeJob, straight: dict[str, bytes]
) -> None:
    with cluster_of(tmp_path, workers=2) as cluster, task_runner(cluster.config, "cpu") as run:
        steps = build(one, IMAGES, instead(run, workers.killed_once))
        assert list(steps) == [(done, SHARDS) for done in range(1, SHARDS + 1)]
        dead = [process.exitcode for process in cluster.others if process.exitcode is not None]
    assert dead == [-9] and files(Path(one.folder)) == straight


@pytest.mark.slow
def test_a_scheduler_that_comes_back_is_given_what_is_left(
    tmp_path: Path, one: EncodeJob, straight: dict[str, bytes]
) -> None:
    told: list[str] = []
    with cluster_of(tmp_path, workers=1) as cluster, task_runner(cluster.config, "cpu", told.append) as run:
        steps = build(one, IMAGES, instead(run, workers.slow))
        assert next(steps) == (1, SHARDS)
        assert cluster.scheduler is not None
        cluster.scheduler.kill()
        cluster.scheduler.join(30)
        cluster.start()
        cluster.worker()
        assert list(steps)[-1] == (SHARDS, SHARDS)
    assert files(Path(one.folder)) == straight
    lost, back = (line for line in told if line.startswith("the scheduler is"))
    assert lost == "the scheduler is lost: waiting for it for 20 s; what is finished stays"
    assert re.fullmatch(r"the scheduler is back: \d tasks are submitted again", back)


@pytest.mark.slow
def test_a_lost_client_runs_again_and_makes_only_what_is_missing(
    tmp_path: Path, one: EncodeJob, straight: dict[str, bytes]
) -> None:
    receipts = Path(one.folder) / "receipts"
    with cluster_of(tmp_path, workers=1) as cluster:
        client = cluster.process(workers.build_slowly, one, IMAGES, cluster.config)
        until(lambda: len(list(receipts.glob("view*.json"))) >= 2)
        client.kill()
        client.join(30)
        made = len(list(receipts.glob("view*.json")))
        with task_runner(cluster.config, "cpu") as run:
            found = list(build(one, IMAGES, run))
    assert 2 <= made < SHARDS and SHARDS - made - 1 <= len(found) <= SHARDS - made and found[-1] == (SHARDS, SHARDS)
    assert files(Path(one.folder)) == straight


@pytest.mark.slow
def test_a_straggler_is_tried_elsewhere_and_comes_too_late_to_write(
    tmp_path: Path, one: EncodeJob, straight: dict[str, bytes]
) -> None:
    told: list[str] = []
    with cluster_of(tmp_path, workers=2) as cluster, task_runner(cluster.config, "cpu", told.append) as run:
        assert len(list(build(one, IMAGES, instead(run, workers.late_once)))) == SHARDS
        assert files(Path(one.folder)) == straight
        (tmp_path / "go").touch()  # now it gives its files their names, were it not too late
        until((tmp_path / "gone").exists)
    assert files(Path(one.folder)) == straight
    assert any(line.endswith("a second worker tries it, too") for line in told)


@pytest.mark.slow
def test_weights_come_once_to_every_worker_that_does_not_see_them(
    tmp_path: Path, weights: Path, straight: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(weights.parent)  # where the workers are not
    one = job(tmp_path / "cache", weights.name)
    with cluster_of(tmp_path, workers=2) as cluster, task_runner(cluster.config, "cpu") as run:
        until(lambda: len(run.client.nthreads()) == 2)
        steps = build(one, IMAGES, instead(run, workers.slow))
        assert next(steps) == (1, SHARDS)
        cluster.worker()  # one that comes later
        until(lambda: len(run.client.nthreads()) == 3)
        assert list(steps)[-1] == (SHARDS, SHARDS)
        events = run.client.get_events(f"permafrost-weights-{one.layout.spec.weights}")
        assert sorted(worker for _, worker in events) == sorted(run.client.nthreads())
        assert len(list(tmp_path.glob(f"worker-*/*/*/{one.layout.spec.weights}.safetensors"))) == 3
    assert files(Path(one.folder)) == straight


def test_weights_that_were_altered_on_their_way_are_refused(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = frozen_hash(ENCODER.vit.state_dict(), CUT)
    monkeypatch.setattr(carried, "CARRIED", {})
    with pytest.raises(carried.WeightsUnseen, match="nowhere is not there, the cache wants its weights="):
        carried.frozen_state("nowhere", CUT, wanted)
    content = bytearray(carried.packed(carried.WeightsUnseen(str(weights), CUT, wanted, "")))
    assert len(content) < 0.7 * weights.stat().st_size  # two of four blocks
    carried.unpack(tmp_path, wanted, bytes(content))
    assert frozen_hash(carried.frozen_state("nowhere", CUT, wanted), CUT) == wanted
    content[-3] ^= 1
    carried.unpack(tmp_path, wanted, bytes(content))
    with pytest.raises(carried.WeightsUnseen, match=rf"up to cut 2, the cache wants weights={wanted[:8]}"):
        carried.frozen_state("nowhere", CUT, wanted)
    carried.forget(tmp_path, wanted)
    assert carried.CARRIED == {} and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_task_that_kills_its_workers_ends_the_run_in_one_line(tmp_path: Path, one: EncodeJob) -> None:
    with (
        cluster_of(tmp_path, workers=1, allowed_failures=0) as cluster,
        task_runner(cluster.config, "cpu") as run,
        pytest.raises(RunFailed, match="1 workers died one after the other over one task"),
    ):
        list(build(one, IMAGES, instead(run, workers.always_killed)))


def test_a_scheduler_that_does_not_answer_is_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cluster.CONNECT", "1s")
    config = ClusterConfig(address=f"tcp://127.0.0.1:{workers.free_port()}")
    refused = pytest.raises(ConfigError, match=r"no Dask scheduler answers at tcp://127.*correct cluster\.address")
    with refused, task_runner(config, "cpu"):
        raise AssertionError


def test_few_tasks_are_submitted_at_a_time() -> None:
    drawn, done, most = 0, 0, 0

    def tasks() -> Iterator[int]:
        nonlocal drawn
        for number in range(200):
            drawn += 1
            yield number

    with task_runner(ClusterConfig(ahead=4), "cpu") as run:
        results = []
        for result in run(lambda number: number * number, tasks()):
            most = max(most, drawn - done)
            done += 1
            results.append(result)
    assert sorted(results) == [number * number for number in range(200)]
    assert most == 8  # four for each of two threads


def test_an_error_of_a_task_ends_the_map_and_cancels_the_rest() -> None:
    began = []

    def fail(number: int) -> int:
        began.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    with task_runner(ClusterConfig(), "cpu") as run, pytest.raises(ValueError, match="three"):
        list(run(fail, range(1000)))
    assert len(began) < 20


@pytest.mark.slow
def test_verify_and_repair_spread_over_worker_processes(
    tmp_path: Path, one: EncodeJob, straight: dict[str, bytes]
) -> None:
    for name, content in straight.items():
        (Path(one.folder) / name).parent.mkdir(parents=True, exist_ok=True)
        (Path(one.folder) / name).write_bytes(content)
    shard = one.layout.shards[4]
    bad = Path(one.folder) / one.layout.files(shard)[0]
    bad.write_bytes(b"x" + bad.read_bytes()[1:])
    with cluster_of(tmp_path, workers=1) as cluster, task_runner(cluster.config, "cpu") as run:
        damages = verify_cache(Path(one.folder), run)
        assert [(damage.file, damage.what) for damage in damages] == [(one.layout.files(shard)[0], "is altered")]
        assert list(mend(one, IMAGES, damages, run)) == [(1, 1)]
        assert verify_cache(Path(one.folder), run) == [] and files(Path(one.folder)) == straight
    shutil.rmtree(one.folder)
    with pytest.raises(MissingCache, match="all workers must see the caches"):
        encode_shard((one, shard, None))


def test_processes_are_chosen_for_the_machine() -> None:
    found = {(cores, gpus): chosen(cores, gpus) for cores in (1, 2, 8, 15, 16, 64) for gpus in (0, 1, 4)}
    assert {cores: found[cores, 0] for cores in (1, 2, 8, 15, 16, 64)} == {1: 0, 2: 0, 8: 0, 15: 0, 16: 2, 64: 8}
    assert {found[cores, 1] for cores in (2, 64)} == {0} and {found[cores, 4] for cores in (2, 64)} == {4}


@pytest.mark.slow
def test_every_gpu_has_a_worker_that_sees_no_other() -> None:
    from distributed import Client

    with on_gpus(["3", "GPU-a"]) as cluster, Client(cluster) as client:
        client.wait_for_workers(2, timeout=30)
        seen = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
        assert sorted(seen.values()) == ["3", "GPU-a"] and set(client.nthreads().values()) == {2}


def test_a_cache_folder_that_a_worker_does_not_see_is_not_made_anew(tmp_path: Path, one: EncodeJob) -> None:
    elsewhere = replace(one, folder=str(tmp_path / "not" / "mounted"))
    with pytest.raises(MissingCache, match=r"mounted is not there on .*all workers must see the caches"):
        encode_shard((elsewhere, one.layout.shards[0], None))
    assert not (tmp_path / "not").exists()


@pytest.mark.slow
def test_probe_features_come_from_workers_to_the_same_bits(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(weights.parent)  # the worker sees neither them nor the run
    config = EvalConfig(batch_size=2, probes=("knn", "logistic"))
    data = replace(open_data(DATA), val=IMAGES.only(range(7)))
    encoder = build_encoder(MODEL, seed=0)
    encoder.vit.load_state_dict(ENCODER.vit.state_dict())
    encoder.set_attention("cpu")
    how = (data, config, 16, "cpu", "float32", 0)
    digest = frozen_hash(ENCODER.vit.state_dict(), ALL)
    with cluster_of(tmp_path, workers=1) as cluster, task_runner(cluster.config, "cpu") as run:
        compute = spread_features(run, weights.name, digest, MODEL, threads=1)
        there = compute(encoder, IMAGES, 2, 16, "cpu", "float32", True)
        assert score(encoder, *how, compute) == score(encoder, *how)
    here = features(encoder, IMAGES, 2, 16, "cpu", "float32", tokens=True)
    assert here.pooled_ND.tobytes() == there.pooled_ND.tobytes()
    assert here.tokens_NLD is not None and there.tokens_NLD is not None and here.tokens_NLD.equal(there.tokens_NLD)


def test_a_worker_with_other_code_is_refused_before_it_makes_anything(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that has run since before an update: it would make the old features under the new name."""
    theirs = ("the frozen forward's version 2", *tasks.MADE_WITH[1:-1], "Pillow 0.0")
    monkeypatch.setattr(tasks, "MADE_WITH", theirs)
    one = job(tmp_path / "cache", str(weights))
    told = rf"the worker on \S+ has the frozen forward's version 1, Pillow {PIL.__version__}, this run {theirs[0]}, "
    with cluster_of(tmp_path, workers=1) as cluster, task_runner(cluster.config, "cpu") as run:
        with pytest.raises(CacheError, match=f"{told}Pillow 0.0: .*; start the workers again"):
            list(build(one, IMAGES, run))
        compute = spread_features(run, str(weights), frozen_hash(ENCODER.vit.state_dict(), ALL), MODEL, threads=1)
        with pytest.raises(CacheError, match=told):
            compute(ENCODER, IMAGES, 2, 16, "cpu", "float32", False)
    assert not list((tmp_path / "cache").glob("receipts/view_*"))


def test_a_task_that_is_done_leaves_nothing_behind() -> None:
    """Neither with the client nor, once Dask's logs are full, with the scheduler and the worker, which are here too.
    With logs of Dask's own length it was 6 kB a task until they were, after hundreds of tasks for each worker."""
    futures, held = 0, dict[int, int]()
    with task_runner(ClusterConfig(), "cpu") as run:
        client = run.client  # type: ignore[attr-defined]
        tracemalloc.start()
        for done, _ in enumerate(run(abs, range(500)), start=1):
            futures = max(futures, len(client.futures))
            if done in (200, 500):
                gc.collect()
                held[done] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        until(lambda: not client.futures)
    assert futures <= 2 * ClusterConfig().ahead * 2
    assert (held[500] - held[200]) / 300 < 2000
