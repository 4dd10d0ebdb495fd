"""A whole stage whose caches lie in an object store: built, resumed, trained from, checked, mended, cleared away."""

from __future__ import annotations

from pathlib import Path

import pytest

from cache.place import matching
from pipeline import care, equivalence, runner
from pipeline.decide import Wanted
from pipeline.job import Job, RunFailed
from pipeline.layout import run_paths
from tests.object_store import ObjectStore
from tests.pipeline.toy import same, toy, weights


@pytest.mark.slow
def test_a_run_with_its_caches_in_a_store_is_the_run_with_them_on_disk(
    object_store: ObjectStore, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = object_store.url(tmp_path / "caches")
    config = toy(**{"cache.root": url})
    paths = run_paths(str(tmp_path / "toy"), url)

    def job(**more: object) -> Job:
        return Job("toy", config, paths, **more)  # type: ignore[arg-type]

    runner.run_stage(job(target=2))
    for stage in ("stage-1", "stage-2"):
        assert same(weights(finished, stage), weights(tmp_path / "toy", stage))
    wanted = Wanted(config, paths)
    names = {wanted.cache_folder(spec).name for stage in (1, 2) if (spec := wanted.cache_spec(stage))}
    assert {folder.name for folder in matching(paths.cache_root, "cut-*")} == names and len(names) == 2
    assert not (tmp_path / "toy" / "cache").exists(), "nothing of them is here"
    equivalence.run_equivalence(job())
    care.run_verify(job())
    bad = next((tmp_path / "caches").glob("cut-1-*/data.zarr/view_1/features/c/1/0/0"))
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-9] + b"x" + whole[-8:])
    with pytest.raises(RunFailed, match="1 damaged files"):
        care.run_verify(job())
    care.run_repair(job())
    assert bad.read_bytes() == whole
    care.run_verify(job())
    runner.run_cache(job(target=1))
    capsys.readouterr()
    care.run_gc(job(yes=True))
    assert "nothing to remove" in capsys.readouterr().out
    other = toy(**{"cache.root": url, "cache.views": 1})
    care.run_gc(Job("toy", other, paths, yes=True))
    assert matching(paths.cache_root, "cut-*") == []
