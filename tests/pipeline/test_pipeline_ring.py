"""The ring of views: at most so many on disk, new ones between epochs, resumed to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache import open_cache
from cache.manifest import read_manifest
from pipeline import equivalence, runner, sharing
from pipeline.checks import check
from pipeline.config import ConfigError, PipelineConfig
from pipeline.decide import Wanted, judge_all
from pipeline.job import Interrupted
from pipeline.layout import RunPaths
from stages import encode, sources
from stages.segment import Segment, turned
from tests.pipeline.test_pipeline_run import StopAfter
from tests.pipeline.toy import job, record, same, toy, weights

RING = {"cache.refresh": 1, "schedule.epochs": [1, 3, 2]}


def ring_run(root: Path, target: int, **changes: object) -> PipelineConfig:
    config = toy(**RING | changes)
    runner.run_stage(job(root, config, target=target))
    return config


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(epoch, view) of every cached step."""
    plain, seen = sources.CachedFeatures.load, []

    def noting(self: sources.CachedFeatures, segment: Segment, step: int, *into: object) -> object:
        manifest = self.cache.manifest
        slot, _ = self.sampling.slot(segment, step, manifest.views)
        seen.append((segment.epoch(step), manifest.spec.view_at(slot)))
        return plain(self, segment, step, *into)

    monkeypatch.setattr(sources.CachedFeatures, "load", noting)
    return seen


def test_views_are_new_and_no_more_than_two_are_kept(
    tmp_path: Path, read: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 is epochs 1-3, stage 2 epochs 4-5, each with two views of a ring of its own that turns at every epoch."""
    encoded = []
    plain = encode.write_rows
    monkeypatch.setattr(encode, "write_rows", lambda *args: encoded.append(args[2:4]) or plain(*args))
    most = []
    turn = sharing.remove_cache
    monkeypatch.setattr(sharing, "remove_cache", lambda folder: most.append(folder.name) or turn(folder))
    config = ring_run(tmp_path / "toy", 1)
    wanted = Wanted(config, RunPaths(tmp_path / "toy"))
    assert sorted(set(read)) == [(1, 1), (2, 2), (3, 3)]
    assert len(encoded) == (2 + 1 + 1) * 3, "three shards a view; only the first ring makes two views"
    assert len(most) == 2, "a turn removes what it replaces"
    (folder,) = wanted.paths.cache_root.glob("cut-1-*")
    assert read_manifest(folder).spec.first_view == 2 and read_manifest(folder).spec.views == 2
    assert record(tmp_path / "toy", "stage-1")["cache_seconds"] > 0
    ring_run(tmp_path / "toy", 2)
    assert sorted(set(read))[3:] == [(4, 0), (5, 1)]
    assert [v.state for v in judge_all(Wanted(config, wanted.paths)) if v.what.startswith("stage")] == ["current"] * 3
    equivalence.run_equivalence(job(tmp_path / "toy", config))


def test_a_ring_that_is_stopped_anywhere_goes_on_to_the_bit(tmp_path: Path) -> None:
    config = ring_run(tmp_path / "straight", 1)
    runner.run_stage(job(tmp_path / "stopped", config, target=0))
    stops = 0
    for asked in (1, 2, 4, 5, 8, 3, 7, 9, 11):  # while a ring is built, and in the middle of epochs
        try:
            runner.run_stage(job(tmp_path / "stopped", config, target=1, stop=StopAfter(asked)))
        except Interrupted:
            stops += 1
    runner.run_stage(job(tmp_path / "stopped", config, target=1))
    assert stops > 3
    assert same(weights(tmp_path / "straight", "stage-1"), weights(tmp_path / "stopped", "stage-1"))
    left = [folder.name for folder in (tmp_path / "stopped" / "cache").glob("cut-*")]
    assert left == [folder.name for folder in (tmp_path / "straight" / "cache").glob("cut-*")]


def test_later_cuts_are_built_from_images(tmp_path: Path) -> None:
    wanted = Wanted(toy(**RING), RunPaths(tmp_path / "toy"))
    assert wanted.features(2).parent is None and Wanted(toy(), wanted.paths).features(2).parent is not None


def test_the_ring_starts_anew_where_the_stage_is_asked_for_something_else(tmp_path: Path) -> None:
    config = ring_run(tmp_path / "toy", 1)
    paths = RunPaths(tmp_path / "toy")
    assert Wanted(config, paths).turns(1) == 2 and json.loads(paths.stage(1).ring.read_text())["turns"] == 2
    assert Wanted(toy(**RING | {"train.lr": 2e-3}), paths).turns(1) == 0


def test_a_teacher_s_caches_do_not_turn() -> None:
    with pytest.raises(ConfigError, match=r"cache.refresh = 1 replaces the views .* use teacher.kind=ema or"):
        check(toy(**RING, **{"target.kind": "teacher"}))


@pytest.mark.parametrize(("every", "wanted"), [(0, [3, 2]), (1, [1, 1, 1, 1, 1]), (2, [2, 1, 1, 1]), (4, [3, 1, 1])])
def test_parts_are_split_where_the_ring_turns(every: int, wanted: list[int]) -> None:
    parts = (
        Segment(3, 2, 3, 20, 30, 10, in_place=0, ends_stage=False),
        Segment(4, 5, 2, 50, 15, 10, in_place=1, ends_stage=True),
    )
    found = turned(parts, every)
    assert [part.epochs for part in found] == wanted
    assert sum(part.epochs for part in found if part.cut == 3) == 3
    assert sum(part.steps for part in found) == 45 and found[-1].ends_stage
    assert [part.ends_stage for part in found[:-1]] == [False] * (len(found) - 1)
    step, epoch = 20, 2
    for part in found:
        assert (part.first_step, part.first_epoch) == (step, epoch)
        step, epoch = step + part.steps, epoch + part.epochs


def test_open_cache_reads_the_views_of_a_ring_by_their_slots(tmp_path: Path) -> None:
    ring_run(tmp_path / "toy", 1)
    (folder,) = (tmp_path / "toy" / "cache").glob("cut-1-*")
    manifest = open_cache(folder).manifest
    assert [manifest.spec.view_at(slot) for slot in range(2)] == [2, 3]
