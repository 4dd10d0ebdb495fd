"""`cache.memory_mb`: refused before anything runs where it is too small, passed on to whatever reads a cache, without a
say in any number."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache import open_cache
from cache.buffers import Buffers
from cache.store import CacheReader
from pipeline import costs, feeds, runner
from pipeline.building import encode_job
from pipeline.config import ConfigError
from pipeline.decide import Wanted
from pipeline.feeds import cached_source
from pipeline.layout import RunPaths
from pipeline.memory import batch_bytes, read_bytes
from tests.cache.conftest import SPEC, make_example
from tests.pipeline.toy import job, same, toy, weights

VARIANTS: dict[str, dict[str, object]] = {
    "pixels": {},
    "features of all groups": {"target.kind": "features", "mask.groups": 4},
    "frozen teacher": {"target.kind": "teacher", "teacher.kind": "frozen", "model.registers": 2},
    "average, pixels cut again": {"heads.blocks": [2, 4], "heads.targets": ["pixels", "teacher"], "mask.groups": 2}
    | {"teacher.kind": "ema", "cache.pixels": "recut", "cache.codec": "int8"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_batch_takes_is_known_before_anything_is_trained(tmp_path: Path, variant: str) -> None:
    config = toy(**VARIANTS[variant])
    wanted = Wanted(config, RunPaths(tmp_path / "toy"))
    segment = wanted.segments[1]
    known = batch_bytes(wanted, 1, segment)
    runner.run_cache(job(tmp_path / "toy", config, target=1))
    into = Buffers()
    cached_source(Wanted(config, RunPaths(tmp_path / "toy")), 1).load(segment, 0, into)
    assert known == into.nbytes
    if variant == "pixels":  # 16 rows of a group's 4 tokens of 32 values, of all tokens' pixels
        assert known == 16 * (4 * 32 * 4 + 16 * 48)


def test_bytes_of_rows_that_are_read(tmp_path: Path) -> None:
    wanted = make_example(prefix=2)
    wanted.build(tmp_path)
    for group in (None, 1):
        into = Buffers()
        open_cache(tmp_path).read([0, 5, 3], group=group, into=into)
        assert read_bytes(wanted.layout.spec, 3, whole=group is None) == into.nbytes
    assert read_bytes(SPEC, 3, whole=False) == 3 * (4 * 6 * 4 + 16 * 48)


LITTLE = {"cache.memory_mb": 1, "train.batch_size": 96, "mask.groups": 1}
"""A batch takes 96 * 2,816 = 0.270 MB; two of them are more than half a MiB."""


def test_too_little_memory_is_refused_before_anything_runs(tmp_path: Path) -> None:
    refused = r"two batches of 0.3 MB of stage 1 do not .* cache.memory_mb = 1, 0.5 MB, .* raise it to 2 or lower train"
    one = job(tmp_path / "toy", toy(**LITTLE))
    for run in (runner.run_all, costs.show_plan):
        with pytest.raises(ConfigError, match=refused):
            run(one)
    with pytest.raises(ConfigError, match=refused):
        runner.run_stage(job(tmp_path / "toy", toy(**LITTLE), target=2))
    assert not (tmp_path / "toy" / "stage-0").exists()
    runner.run_stage(job(tmp_path / "toy", toy(**LITTLE), target=0))


def test_the_setting_reaches_what_builds_caches_and_changes_no_number(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positional reads, as of a cache beyond the memory, and one batch ahead, against mapped files and four ahead."""
    mapped: list[bool] = []

    def unmapped(path: Path, memory: int) -> CacheReader:
        mapped.append(open_cache(path, memory=memory)._mapped)  # type: ignore[attr-defined]
        return open_cache(path, memory=0)

    little = toy(**{"cache.memory_mb": 1, "train.prefetch": 1})
    wanted = Wanted(little, RunPaths(finished))
    one = encode_job(wanted, wanted.features(2))
    assert one.memory == 2**19 == little.cache.memory
    monkeypatch.setattr(feeds, "open_cache", unmapped)
    runner.run_stage(job(tmp_path / "toy", little, target=2))
    assert len(mapped) >= 2 and all(mapped) and toy().train.prefetch == 4
    for stage in ("stage-1", "stage-2"):
        assert same(weights(finished, stage), weights(tmp_path / "toy", stage))
