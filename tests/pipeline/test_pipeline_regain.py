"""A finished cache that has lost its manifest: whoever asks for it has it back, without computing what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cache.manifest import manifest_copy
from pipeline import runner
from pipeline.decide import Wanted
from pipeline.layout import RunPaths
from tests.pipeline.toy import job, same, toy, weights

SHARD = "data.zarr/view_1/features/c/1/0/0"


def folder_of(root: Path, stage: int) -> Path:
    wanted = Wanted(toy(), RunPaths(root))
    spec = wanted.cache_spec(stage)
    assert spec is not None
    return wanted.cache_folder(spec)


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file but the manifest, and by what a new one in its place would be known."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def lose_manifest(folder: Path) -> bytes:
    content = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()
    return content


def test_a_lost_manifest_costs_no_shard_and_no_parent(copy: Path, finished: Path, capsys) -> None:
    folder = folder_of(copy, 2)
    before, manifest = files(folder), lose_manifest(folder)
    shutil.rmtree(copy / "stage-2")
    shutil.rmtree(folder_of(copy, 1))
    runner.run_stage(job(copy, target=2))
    assert len(before) > 20 and files(folder) == before
    assert (folder / "manifest.json").read_bytes() == manifest
    assert not folder_of(copy, 1).exists(), "what it was built from is not needed"
    assert same(weights(finished, "stage-2"), weights(copy, "stage-2"))
    assert f"{folder}: manifest.json was gone, its copy is in its place" in capsys.readouterr().out


def test_what_is_damaged_besides_is_computed_and_no_more(copy: Path) -> None:
    folder = folder_of(copy, 1)
    good, before, manifest = (folder / SHARD).read_bytes(), files(folder), lose_manifest(folder)
    (folder / SHARD).write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    runner.run_cache(job(copy, target=1))
    after = files(folder)
    assert (folder / "manifest.json").read_bytes() == manifest and (folder / SHARD).read_bytes() == good
    again = {name for name, stamp in before.items() if after[name] != stamp}
    assert SHARD in again and all(name.startswith("data.zarr/view_1/") and "/c/1" in name for name in again)


@pytest.mark.parametrize("why", ["a build has begun since", "the copy is damaged", "the copy is another's"])
def test_a_copy_that_may_not_be_true_is_left_alone(copy: Path, why: str) -> None:
    folder = folder_of(copy, 1)
    before, manifest = files(folder), lose_manifest(folder)
    if why.startswith("a build"):
        (folder / "receipts").mkdir()
    elif why.endswith("damaged"):
        manifest_copy(folder).write_bytes(manifest[:-100] + b"x" + manifest[-99:])
    else:
        shutil.copy(manifest_copy(folder_of(copy, 2)), manifest_copy(folder))
    runner.run_cache(job(copy, target=1))
    assert (folder / "manifest.json").read_bytes() == manifest == manifest_copy(folder).read_bytes()
    after = files(folder)
    assert after.keys() == before.keys() and after[SHARD] != before[SHARD], "built anew, to the same bits"


def test_caches_that_the_comparison_times_are_there_before_the_arms_take_their_hours(copy: Path) -> None:
    """Stages are current without them, and the comparison is what would have failed."""
    for stage in (1, 2):
        shutil.rmtree(folder_of(copy, stage))
    shutil.rmtree(copy / "arms")
    (copy / "speedup.json").unlink()
    (copy / "events.jsonl").unlink()
    runner.run_all(job(copy))
    told = [json.loads(line) for line in (copy / "events.jsonl").read_text().splitlines()]
    kinds = [event.keys() & {"cache_seconds", "arm"} for event in told]
    order = ["cache" if "cache_seconds" in kind else "arm" for kind in kinds if kind]
    assert {"cache", "arm"} == set(order) and "cache" not in order[order.index("arm") :]
    assert (copy / "speedup.json").exists()


def test_they_are_timed_before_they_go_again_where_only_needed_ones_stay(copy: Path, capsys) -> None:
    for stage in (1, 2):
        shutil.rmtree(folder_of(copy, stage))
    (copy / "speedup.json").unlink()
    runner.run_all(job(copy, toy(**{"cache.keep": "needed"})))
    assert (copy / "speedup.json").exists()
    assert not any(folder_of(copy, stage).exists() for stage in (1, 2))
    assert capsys.readouterr().out.count(": built in ") == 2, "the second of the first"
