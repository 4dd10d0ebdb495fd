"""Runs whose caches are tars, or stored in fewer bytes: built, compared with live ones, damaged, mended, refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache.errors import TooCoarse
from cache.manifest import read_manifest
from cache.size import cache_bytes
from pipeline import care, equivalence, runner
from pipeline.costs import codec_bytes, price_lines
from pipeline.decide import Wanted, judge_all, judge_cache, new_needs
from pipeline.job import RunFailed
from pipeline.layout import RunPaths
from tests.pipeline.toy import job, record, toy

SMALL = {"schedule.epochs": [1, 1, 1]}


def states(root: Path, **changes: Any) -> dict[str, str]:
    found = judge_all(Wanted(toy(**SMALL | changes), RunPaths(root)))
    return {verdict.what: verdict.state for verdict in found if verdict.what[:5] in ("cache", "stage")}


@pytest.mark.parametrize("backend", ["zarr", "webdataset"])
def test_an_int8_run_is_built_compared_damaged_and_mended(tmp_path: Path, backend: str) -> None:
    changes = {"cache.backend": backend, "cache.codec": "int8", "cache.block": 8}
    config, paths = toy(**SMALL | changes), RunPaths(tmp_path)
    runner.run_stage(job(tmp_path, config, target=2))
    assert record(tmp_path, "stage-2")["status"] == "done"
    wanted = Wanted(config, paths)
    folders = [wanted.cache_folder(wanted.cache_spec(stage)) for stage in (1, 2)]
    first, second = map(read_manifest, folders)
    assert first.backend == backend and first.spec.block == 8
    assert 1e-3 < first.accumulated_error < second.accumulated_error < 0.02
    assert (first.error_samples, second.error_samples) == (0, 8) and second.error_basis == "of 8 samples"
    equivalence.run_equivalence(job(tmp_path, config))
    assert equivalence.compare_stage(wanted, 2).feature_rmse > 1e-3  # which float16's bound alone would refuse
    care.run_verify(job(tmp_path, config))
    whole = {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    shard = next(folders[1] / entry.name for entry in second.shards if entry.rows)
    shard.write_bytes(whole[shard][:-1] + bytes([whole[shard][-1] ^ 1]))
    with pytest.raises(RunFailed, match="1 damaged files"):
        care.run_verify(job(tmp_path, config))
    care.run_repair(job(tmp_path, config))
    assert {path: path.read_bytes() for path in whole} == whole
    # What changes only how numbers lie on disk leaves everything current; the codec and its block do not.
    other = {"cache.backend": "zarr" if backend == "webdataset" else "webdataset", "cache.shard_rows": 32}
    assert set(states(tmp_path, **changes | other).values()) == {"current"}
    other = {"cache.backend": "zarr", "cache.filter": "zstd"}
    assert set(states(tmp_path, **changes | other).values()) == {"current"}
    for change in ({"cache.codec": "bfloat16"}, {"cache.block": 16}):
        found = states(tmp_path, **changes | change)
        assert found["stage 0"] == "current" and found["stage 1"] == found["cache 1"] == "stale"
    found = states(tmp_path, **changes | {"cache.later_codec": "bfloat16"})
    assert found["cache 1"] == found["stage 1"] == "current" and found["cache 2"] == found["stage 2"] == "stale"


def test_a_later_codec_is_that_of_the_second_cut_only(tmp_path: Path) -> None:
    wanted = Wanted(toy(**{"cache.later_codec": "int8", "cache.block": 16}), RunPaths(tmp_path))
    assert [wanted.features(stage).draft.codec for stage in (1, 2)] == ["float16", "int8"]
    assert [wanted.features(stage).draft.block for stage in (1, 2)] == [0, 16]


def test_plan_prices_every_codec(tmp_path: Path) -> None:
    wanted = Wanted(toy(), RunPaths(tmp_path))
    found = codec_bytes(wanted)
    needs = [need for stage in (1, 2) for need in new_needs(wanted, stage)]
    assert found["float16"] == sum(cache_bytes(wanted.layout(need)) for need in needs) == found["bfloat16"]
    values = 2 * 2 * 96 * 16 * 32  # caches, views, images, tokens, channels
    # Half of 2 bytes saved, a scale of 2 bytes for 32 channels, 4 groups a sample with 4 + 16 bytes of checksum and
    # index (the last shard of 40 rows has 16), and some metadata.
    assert found["int8"] - found["float16"] == pytest.approx(-values + values // 16 + 4 * 96 * 4 * 20, abs=15_000)
    assert set(codec_bytes(Wanted(toy(**{"model.width": 40, "cache.block": 32}), wanted.paths))) == {
        "float16",
        "bfloat16",
    }
    (line,) = price_lines({"codecs": found})
    assert line.startswith("caches by cache.codec: float16 ") and "at most that" in line


def test_a_cache_that_loses_too_much_is_refused_with_the_numbers(tmp_path: Path) -> None:
    changes = {"cache.codec": "int8", "cache.max_error": 1e-3}
    with pytest.raises(TooCoarse, match=r"int8 in blocks of 32 channels loses 0\.00\d+ .* cache.max_error = 0.001"):
        runner.run_cache(job(tmp_path, toy(**SMALL | changes), target=1))
    config = toy(**SMALL | changes | {"cache.max_error": 0.05})
    runner.run_cache(job(tmp_path, config, target=1))
    wanted = Wanted(config, RunPaths(tmp_path))
    assert judge_cache(wanted, wanted.features(1)).current
    stricter = replace(config, cache=replace(config.cache, max_error=1e-3))
    with pytest.raises(TooCoarse, match=r"at cut 3, behind the caches before it, differs by 0\.00\d+ "):
        runner.run_cache(job(tmp_path, stricter, target=2))
