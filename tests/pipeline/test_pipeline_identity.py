"""What makes a cache stale and what does not: every row of the table in docs/CACHE.md is tried, and no other."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from cache.size import cache_bytes
from pipeline import decide
from pipeline.config import PipelineConfig
from pipeline.decide import Wanted, judge_cache
from pipeline.layout import RunPaths
from tests.pipeline.toy import record, toy
from tests.stages.conftest import encoded, in_folder, in_tar

DOCS = Path(__file__).parents[2] / "docs" / "CACHE.md"
TABLE = re.compile(r"^### What is built again$.*?^\| --- .*?\n(.*?)^$", re.MULTILINE | re.DOTALL)


def rows_of_docs() -> dict[str, bool]:
    """Change -> whether the cache is built again, as the docs say."""
    found = TABLE.search(DOCS.read_text(encoding="utf-8"))
    assert found is not None
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in found[1].splitlines()]
    assert all(row[-1] in ("yes", "no") for row in rows)
    return {row[0]: row[-1] == "yes" for row in rows}


class World(NamedTuple):
    """A run on ten images of a folder, up to the caches that it wants, and what may be changed about it."""

    root: Path
    images: Path
    patch: pytest.MonkeyPatch

    def spec(self, stage: int = 1, **changes: object) -> str:
        """The fingerprint of a stage's cache under other settings."""
        base = {"data.source": str(self.images), "data.val_source": str(self.root.with_name("val")), "data.limit": 0}
        spec = Wanted(toy(**({"train.batch_size": 4} | base | changes)), RunPaths(self.root)).cache_spec(stage)
        assert spec is not None
        return spec.fingerprint


@pytest.fixture
def world(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    files = {f"{'ab'[row % 2]}/{row}.png": encoded(row, size=(20, 20)) for row in range(10)}
    stage = record(finished, "stage-0")
    in_folder(tmp_path / "val", {"v.png": encoded(50)})
    (tmp_path / "run/stage-0").mkdir(parents=True)
    (tmp_path / "run/stage-0/stage.json").write_text(json.dumps(stage))
    (tmp_path / "run/stage-1").mkdir()
    (tmp_path / "run/stage-1/stage.json").write_text(json.dumps(record(finished, "stage-1")))
    return World(tmp_path / "run", in_folder(tmp_path / "images", files), monkeypatch)


def setting(stage: int = 1, also: dict[str, object] | None = None, **changes: object) -> Callable[[World], bool]:
    """Whether the cache is another with other settings; `also` holds before and after."""
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return lambda world: world.spec(stage, **(also or {})) != world.spec(stage, **((also or {}) | dotted))


def edit(change: Callable[[World], object], stage: int = 1) -> Callable[[World], bool]:
    """Whether the cache is another after something has been done to the world."""

    def changed(world: World) -> bool:
        before = world.spec(stage)
        change(world)
        return world.spec(stage) != before

    return changed


def other_weights(cut: int) -> Callable[[World], object]:
    """Frozen weights up to a cut, as the record of the stage before has them, are others."""

    def change(world: World) -> None:
        path = world.root / "stage-0/stage.json"
        found = json.loads(path.read_text())
        found["frozen_weights"][str(cut)] = "0" * 64
        path.write_text(json.dumps(found))

    return change


def edit_in_place(world: World) -> None:
    path = world.images / "a/4.png"
    stat, content = path.stat(), path.read_bytes()
    with path.open("r+b") as file:
        file.write(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def relabelled(world: World) -> bool:
    """The same images under the same keys, one of another class."""
    files = {f"{row}.png": encoded(row) for row in range(4)} | {f"{row}.cls": b"0" for row in range(4)}
    tars = world._replace(images=in_tar(world.root.with_name("images.tar"), files))
    before = tars.spec()
    in_tar(tars.images, files | {"2.cls": b"1"})
    return tars.spec() != before


def moved_run(world: World) -> bool:
    before = world.spec()
    other = world._replace(root=world.root.rename(world.root.with_name("other")))
    return other.spec() != before


def moved_images(world: World) -> bool:
    before = world.spec()
    return world._replace(images=world.images.rename(world.images.with_name("elsewhere"))).spec() != before


def moved_to_a_store(world: World) -> bool:
    """Any store: the list of images, which the fingerprint covers, is made alike for all."""
    import fsspec

    before = world.spec()
    fsspec.filesystem("memory").put(str(world.images), "/moved", recursive=True)
    return world.spec(**{"data.source": "memory://moved"}) != before


def moved_caches(world: World) -> bool:
    """In a whole run: is the cache current where it was moved to?"""
    store = world.root.with_name("store")
    return world.spec() != world.spec(**{"cache.root": str(store)})


def stage_before_runs_live(world: World) -> bool:
    """Is the second cut's cache another where there is room for one and a half?"""
    base = toy(**{"data.source": str(world.images), "data.limit": 0, "train.batch_size": 4})
    wanted = Wanted(base, RunPaths(world.root))
    room = 1.5e-9 * cache_bytes(wanted.layout(wanted.features(1)))
    return world.spec(2) != world.spec(2, **{"cache.budget_gb": room, "cache.over_budget": "live"})


FULL: dict[str, object] = {"mask.groups": 1}
INT8: dict[str, object] = {"cache.codec": "int8", "cache.block": 8}
CHANGES: dict[str, Callable[[World], bool]] = {
    "weights of the frozen blocks": edit(other_weights(1)),
    "weights behind the cut": edit(other_weights(2)),
    "cut": setting(schedule__cuts=[0, 2, 3]),
    "mode: token groups": setting(mask__groups=2),
    "share of masked tokens": setting(also=FULL, mask__ratio=0.6),
    "squares of the mask, grouped": setting(mask__block=2),
    "squares of the mask, full mode": setting(also=FULL, mask__block=2),
    "seed of views and masks": setting(seed=1),
    "number of views": setting(cache__views=3),
    "crop scale": setting(data__crop_scale=[0.3, 1.0]),
    "flip": setting(data__flip=0.0),
    "image size": setting(model__image_size=32),
    "number of images": setting(data__limit=9),
    "an image added": edit(lambda world: shutil.copy(world.images / "a/4.png", world.images / "a/new.png")),
    "an image removed": edit(lambda world: (world.images / "a/4.png").unlink()),
    "an image renamed": edit(lambda world: (world.images / "a/4.png").rename(world.images / "a/five.png")),
    "an image relabelled": relabelled,
    "an image edited in place, its size and time put back": edit(edit_in_place),
    "an image touched": edit(lambda world: os.utime(world.images / "a/4.png")),
    "the folder of images moved": moved_images,
    "the folder of images moved to a store": moved_to_a_store,
    "local copies of images in a store": setting(data__cache_gb=0.0),
    "precision of the frozen blocks": setting(train__precision="bfloat16"),
    "codec": setting(cache__codec="bfloat16"),
    "codec of later cuts, for the first": setting(cache__later_codec="int8"),
    "block of int8 scales": setting(also=INT8, cache__block=16),
    "block of int8 scales, float codec": setting(cache__block=16),
    "bits kept": setting(cache__filter="bitround-6"),
    "lossless filter": setting(cache__filter="zstd"),
    "stored pixels": setting(cache__pixels="recut"),
    "target that needs no pixels any more": setting(target__kind="features"),
    "target, other of the same pixels": setting(target__kind="hog"),
    "the cache that it continues": edit(other_weights(1), stage=2),
    "version of the computation": edit(lambda world: world.patch.setattr(decide, "COMPUTATION_VERSION", 99)),
    "batch size of training": setting(train__batch_size=2),
    "batch size of encoding": setting(cache__encode_batch=3),
    "workers": setting(cluster__workers=2),
    "threads": setting(train__threads=2, train__loader_threads=7, cluster__threads=3),
    "size of shards": setting(cache__shard_rows=7),
    "backend": setting(cache__backend="webdataset"),
    "order of rows": setting(cache__shuffle="blocks"),
    "largest error": setting(cache__max_error=0.5),
    "name of the run": moved_run,
    "folder of the caches, moved along": moved_caches,
    "a stage before that runs live": stage_before_runs_live,
    "budget that holds all caches": setting(cache__budget_gb=1.0, cache__over_budget="live"),
    "which caches stay": setting(cache__keep="needed"),
    "learning rate of a later stage": setting(train__lr=0.5),
    "epochs of a later stage": setting(schedule__epochs=[1, 1, 3]),
    "decoder": setting(decoder__depth=2, decoder__width=32),
    "probes": setting(eval__knn_k=5),
}


def test_the_table_and_the_trials_have_the_same_rows() -> None:
    assert list(rows_of_docs()) == list(CHANGES)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_has_the_effect_that_the_table_says(world: World, change: str) -> None:
    world.spec()
    assert CHANGES[change](world) is rows_of_docs()[change]


def test_an_equal_fingerprint_is_a_current_cache_and_another_is_not(finished: Path, tmp_path: Path) -> None:
    """The verdict on a whole run follows the fingerprint, wherever its caches were moved to."""
    store = shutil.copytree(finished / "cache", tmp_path / "store")

    def current(config: PipelineConfig, paths: RunPaths) -> bool:
        wanted = Wanted(config, paths)
        return judge_cache(wanted, wanted.features(1)).current

    for paths in (RunPaths(finished), RunPaths(finished, store)):
        quiet = {"cache.shard_rows": 7, "cache.backend": "webdataset", "cache.encode_batch": 3, "cache.filter": "none"}
        assert current(toy(), paths) and current(toy(**quiet), paths)
        assert not current(toy(**{"cache.views": 3}), paths) and not current(toy(seed=1), paths)
