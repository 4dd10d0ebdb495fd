"""Builds as jobs of a real SLURM: what becomes of them ends in the cache that one worker makes, file by file. Skipped
where SLURM is not installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import pytest
from safetensors.torch import save_file

from cache.layout import Layout
from models.config import ModelConfig
from models.vit import build_encoder, frozen_hash
from pipeline import batch
from pipeline.cluster import task_runner
from pipeline.config import ClusterConfig, ConfigError
from pipeline.job import Interrupted, RunFailed
from stages.config import DataConfig
from stages.encode import EncodeJob, build
from stages.images import open_data
from tests.encoding import encode_job, tiny_spec
from tests.pipeline import workers
from tests.pipeline.slurm_here import MISSING, Slurm
from tests.pipeline.workers import CONTEXT, files, instead

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no SLURM here: {', '.join(MISSING)} not found (Debian: slurm-wlm)"),
    pytest.mark.timeout(180),
]
REPOSITORY = Path(__file__).parents[2]
MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=4, heads=2)
DATA = DataConfig(limit=24)
CUT, SHARDS = 2, 12


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM at work, which the environment names; a worker that is lost is missed at once."""
    found = Slurm(tmp_path_factory.mktemp("slurm"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(batch, "ASK_EVERY", 0.5)
        try:
            found.start()
            yield found
        finally:
            found.stop()


@pytest.fixture(scope="module")
def images() -> Any:
    return open_data(DATA).train


@pytest.fixture(scope="module")
def made(images: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], EncodeJob]:
    """Makes the job of the cache in a folder; all have the same weights."""
    encoder = build_encoder(MODEL, seed=3)
    weights = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(encoder.vit.state_dict(), weights)
    spec = tiny_spec(images, DATA, frozen_hash(encoder.vit.state_dict(), CUT), CUT)
    layout = Layout(spec, len(images), shard_rows=4)
    return lambda folder: encode_job(folder, layout, MODEL, DATA, str(weights), batch=4)


@pytest.fixture(scope="module")
def straight(
    made: Callable[[Path], EncodeJob], images: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """The files of the cache as one worker inside this process makes it."""
    one = made(tmp_path_factory.mktemp("straight") / "cache")
    with task_runner(ClusterConfig(), "cpu") as run:
        assert list(build(one, images, run))[-1] == (SHARDS, SHARDS)
    return files(Path(one.folder))


@pytest.fixture
def one(tmp_path: Path, made: Callable[[Path], EncodeJob]) -> EncodeJob:
    return made(tmp_path / "cache")


def asked(folder: Path, **settings: Any) -> ClusterConfig:
    """Small jobs, whose output goes into the folder."""
    few: dict[str, Any] = {"kind": "slurm", "workers": 1, "threads": 1, "memory": "2GB", "walltime": "00:10:00"}
    return ClusterConfig(**(few | {"directives": f"-o {folder}/job-%j.out", "patience": 20} | settings))


def test_a_job_that_is_cancelled_is_followed_by_another(
    slurm: Slurm,
    tmp_path: Path,
    one: EncodeJob,
    images: Any,
    straight: dict[str, bytes],
) -> None:
    told: list[str] = []
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "500ms"}),
        task_runner(asked(tmp_path), "cpu", told.append) as run,
    ):
        steps = build(one, images, instead(run, workers.slow))
        assert next(steps) == (1, SHARDS)
        (first,) = slurm.jobs()
        slurm.said("scancel", first)
        assert list(steps)[-1] == (SHARDS, SHARDS)
        assert first not in (left := slurm.jobs()) and len(left) == 1
    slurm.until(lambda: not slurm.jobs())
    assert files(Path(one.folder)) == straight
    assert "no worker is left: waiting for one" in told


def test_a_client_that_is_killed_leaves_no_job_and_the_same_command_makes_the_rest(
    slurm: Slurm, tmp_path: Path, one: EncodeJob, images: Any, straight: dict[str, bytes]
) -> None:
    receipts = Path(one.folder) / "receipts"
    task = workers.in_environment, dict(os.environ), workers.build_slowly, one, images, asked(tmp_path)
    client = CONTEXT.Process(target=workers.bounded, args=task)
    client.start()
    slurm.until(lambda: len(list(receipts.glob("view*.json"))) >= 2, 60)
    client.kill()
    client.join(30)
    assert len(slurm.jobs()) == 1
    slurm.until(lambda: not slurm.jobs(), 60)
    assert len(list(receipts.glob("view*.json"))) < SHARDS
    with task_runner(ClusterConfig(), "cpu") as run:
        assert list(build(one, images, run))[-1] == (SHARDS, SHARDS)
    assert files(Path(one.folder)) == straight


def test_a_partition_that_is_not_there_ends_the_run_in_one_line(
    slurm: Slurm, tmp_path: Path, one: EncodeJob, images: Any
) -> None:
    refused = r"^sbatch takes no job: [^\n]*invalid partition specified: nowhere; [^\n]*look at cluster.queue[^\n]*$"
    with pytest.raises(ConfigError, match=refused), task_runner(asked(tmp_path, queue="nowhere"), "cpu") as run:
        list(build(one, images, run))


def test_a_job_that_waits_says_why_and_is_withdrawn_when_the_run_is_stopped(
    slurm: Slurm, tmp_path: Path, one: EncodeJob, images: Any
) -> None:
    told: list[str] = []

    def stop() -> bool:
        return any("waiting in the queue" in line for line in told)

    with (
        pytest.raises(Interrupted),
        task_runner(asked(tmp_path, queue="closed"), "cpu", told.append, stop) as run,
    ):
        list(build(one, images, run))
    assert "1 job is waiting in the queue (PartitionDown)" in told
    slurm.until(lambda: not slurm.jobs())


def test_jobs_that_end_before_their_worker_comes_end_the_run(
    slurm: Slurm, tmp_path: Path, one: EncodeJob, images: Any
) -> None:
    ended = pytest.raises(
        RunFailed, match=r"^3 jobs have ended before their worker came, the last \d+; what they print"
    )
    with ended, task_runner(asked(tmp_path, prologue="echo no such module; exit 3"), "cpu") as run:
        list(build(one, images, run))
    assert {path.read_text() for path in tmp_path.glob("job-*.out")} == {"no such module\n"}
    slurm.until(lambda: not slurm.jobs())
