"""Room on the disk: what lies there already of caches that are to be built is not asked for again, and what truly does
not fit is refused before anything starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from cache.manifest import manifest_copy, read_manifest
from cache.place import files_below
from cache.receipts import receipt_name, write_receipt
from cache.size import cache_bytes
from pipeline import disk, runner
from pipeline.config import ConfigError
from pipeline.decide import Wanted
from pipeline.layout import RunPaths
from tests.pipeline.toy import job, toy

TWO = {"schedule.cuts": [0, 1], "schedule.epochs": [1, 1], "cache.shard_rows": 24, "train.lr_schedule": "constant"}
"""One cache, of four shards a view."""
THREE = TWO | {"cache.keep": "needed", "schedule.cuts": [0, 1, 2, 3], "schedule.epochs": [1, 1, 1, 1]}
"""Three caches, of which two lie there at once."""
REFUSED = r"caches of stages 1-1 with cache.views={} need [\d.]+ GB, .* has [\d.]+ GB free; lower cache.views"

Free = Callable[[float], None]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("room") / "toy"
    runner.run_cache(job(root, toy(**TWO), target=1))
    return root


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "toy")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Free:
    """free(size) makes a disk of so many bytes on which only caches lie: files of two names count once."""
    sizes: list[float] = []

    def left(_: Path) -> float:
        stats = [path.stat() for path, _ in files_below(tmp_path) if "/cache/cut-" in str(path)]
        return sizes[-1] - sum({stat.st_ino: stat.st_size for stat in stats}.values())

    for module in ("pipeline.disk", "cache.size"):
        monkeypatch.setattr(f"{module}.free_bytes", left)
    return sizes.append


@cache
def size(views: int = 2) -> int:
    """Bytes of a cache."""
    with TemporaryDirectory() as place:
        wanted = Wanted(toy(**TWO | {"cache.views": views}), RunPaths(Path(place)))
        return cache_bytes(wanted.layout(wanted.features(1)))


def stopped(root: Path) -> Path:
    """The cache of a run as it were had its build been stopped when its first view was done."""
    (folder,) = (root / "cache").glob("cut-1-*")
    manifest = read_manifest(folder)
    entries = {entry.name: entry for entry in manifest.shards}
    for shard in manifest.layout.shards[:4]:
        files = [entries[name] for name in manifest.layout.files(shard)]
        write_receipt(folder, manifest.layout, receipt_name(shard), files)
    for path in (folder / "manifest.json", manifest_copy(folder)):
        path.unlink()
    shutil.rmtree(folder / "data.zarr/view_1")
    return folder


def look(root: Path, last: int = 1, **changes: object) -> None:
    """What every verb that builds, and `plan`, asks first."""
    disk.refuse_what_does_not_fit(Wanted(toy(**TWO | changes), RunPaths(root)), last)


def test_an_interrupted_build_goes_on_where_the_rest_fits(root: Path, free: Free) -> None:
    folder = stopped(root)
    lies = sum(found for _, found in files_below(folder))
    assert 0.4 * size() < lies < 0.6 * size()
    free(lies + 0.45 * size())
    with pytest.raises(ConfigError, match=REFUSED.format(2)):
        runner.run_cache(job(root, toy(**TWO), target=1))
    assert sum(found for _, found in files_below(folder)) == lies, "nothing was started"
    free(lies + 0.6 * size())
    look(root)
    runner.run_cache(job(root, toy(**TWO), target=1))
    assert (folder / "manifest.json").exists()


def test_receipts_of_another_layout_save_nothing(root: Path, free: Free) -> None:
    stopped(root)
    free(1.2 * size())
    with pytest.raises(ConfigError, match=REFUSED.format(2)):
        look(root, **{"cache.shard_rows": 25})
    look(root)


def test_a_grown_cache_needs_room_for_what_is_new_only(root: Path, free: Free) -> None:
    grown = {"cache.views": 4}
    free(size() + 0.45 * size(4))
    with pytest.raises(ConfigError, match=REFUSED.format(4)):
        runner.run_cache(job(root, toy(**TWO | grown), target=1))
    assert len(list((root / "cache").glob("cut-*"))) == 1
    free(size() + 0.6 * size(4))
    with pytest.raises(ConfigError, match=REFUSED.format(4)):  # other shards are computed, or copied row by row
        look(root, **grown, **{"cache.shard_rows": 25})
    runner.run_cache(job(root, toy(**TWO | grown), target=1))
    assert len(list((root / "cache").glob("cut-*/manifest.json"))) == 2


def test_a_cache_that_lost_its_manifest_needs_no_room(root: Path, free: Free) -> None:
    (folder,) = (root / "cache").glob("cut-1-*")
    (folder / "manifest.json").unlink()
    free(1.2 * size())
    runner.run_cache(job(root, toy(**TWO), target=1))
    assert (folder / "manifest.json").exists()
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "data.zarr/view_1")
    with pytest.raises(ConfigError, match=REFUSED.format(2)):
        look(root)


def test_what_was_begun_gives_its_room_back_when_it_goes(root: Path, free: Free) -> None:
    stopped(root)
    free(2.1 * size())
    look(root, 3, **THREE)
    free(1.9 * size())
    with pytest.raises(ConfigError, match=r"caches of stages 1-3 with cache.views=2 need"):
        look(root, 3, **THREE)


def test_what_other_weights_will_make_is_not_there(root: Path, free: Free) -> None:
    stopped(root)
    free(1.2 * size())
    look(root)
    shutil.rmtree(root / "stage-0")
    with pytest.raises(ConfigError, match=REFUSED.format(2)):
        look(root)
