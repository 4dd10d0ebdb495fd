"""What `verify` advises about caches that are damaged, or of no use: whoever follows it has sound ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache.manifest import atomic_write, read_manifest, seal
from cache.patience import StoreConfig, store_settings, use_store
from cache.place import StoreUnreachable, place_of
from pipeline import care, runner
from pipeline.__main__ import main
from pipeline.decide import Wanted
from pipeline.job import Job
from pipeline.layout import run_paths
from pipeline.sharing import used
from tests.cache.conftest import files_of
from tests.pipeline.toy import SMALL, toy, weights

Told = pytest.CaptureFixture[str]


def in_store(place: Path, name: str, **changes: object) -> Job:
    """Stage 1's cache is to be built by the run `place/name`, in `place/store`."""
    config = toy(**SMALL | {"data.limit": 48, "eval.train_limit": 24, "cache.root": str(place / "store")} | changes)
    return Job("toy", config, run_paths(str(place / name), config.cache.root), target=1)


def folder_of(job: Job) -> Path:
    """Where the run's cache lies."""
    wanted = Wanted(job.config, job.paths)
    spec = wanted.cache_spec(1)
    assert spec is not None
    return wanted.cache_folder(spec)


def words(verb: str, job: Job, *more: str) -> list[str]:
    return [verb, "--config", str(job.paths.config), "--run", str(job.paths.root), *more]


def harm(folder: Path) -> Path:
    """One bad byte, in no file that another cache has by a link."""
    victim = folder / "data.zarr/view_0/features/c/0/0/0"
    content = victim.read_bytes()
    victim.unlink()
    victim.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    return victim


def earlier(folder: Path, version: int = 1) -> None:
    """Lets a cache be of another version's format."""
    atomic_write(folder / "manifest.json", seal({**read_manifest(folder).to_dict(), "format": version}))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the cache of its stage 1."""
    place = tmp_path_factory.mktemp("care")
    runner.run_cache(in_store(place, "first"))
    return place


@pytest.fixture
def first(built: Path) -> Iterator[Job]:
    """The same where it was built, for runs and stores are known by their paths; whole again afterwards."""
    job = in_store(built, "first")
    kept = shutil.copytree(built, built.with_name("kept"))
    yield job
    shutil.rmtree(built)
    kept.rename(built)


def test_damage_of_an_older_setting_s_cache_is_cleared_away_by_what_verify_advises(first: Job, capsys: Told) -> None:
    """With `cache.keep=all` it stays, and `repair`, which goes by the settings, never looks at it."""
    renewed = in_store(first.paths.root.parent, "first", **{"cache.views": 4})
    runner.run_cache(renewed)
    old = folder_of(first)
    victim = harm(old)
    asked = ["--set", "cache.views=4"]
    capsys.readouterr()
    assert main(words("verify", first, *asked)) == 1
    told = capsys.readouterr()
    assert f"{folder_of(renewed)}: sound, " in told.out
    assert f"damaged: {victim.relative_to(old)}: is altered\n{old}: 1 damaged files\n" in told.out
    assert told.err == (f"permafrost: 1 damaged files; run `make gc`, which removes what no run asks for: {old.name}\n")
    assert main(words("gc", first, *asked, "--yes")) == 0 and not old.exists()
    assert main(words("verify", first, *asked)) == 0


def test_damage_of_another_run_s_cache_is_mended_where_verify_says(first: Job, capsys: Told) -> None:
    second = in_store(first.paths.root.parent, "second", **{"cache.views": 1})
    runner.run_cache(second)
    whole, root = files_of(folder_of(first)), first.paths.root
    harm(folder_of(first))
    capsys.readouterr()
    assert main(words("verify", second)) == 1
    asked = f"make repair CONFIG={root}/config.toml RUN={root}"
    assert capsys.readouterr().err == (
        f"permafrost: 1 damaged files; run `{asked}`, for {root} uses {folder_of(first).name}\n"
    )
    assert main(words("repair", first)) == 0 and files_of(folder_of(first)) == whole
    assert main(words("verify", second)) == 0


def test_damage_here_there_and_nowhere_has_a_remedy_each(first: Job, capsys: Told) -> None:
    second = in_store(first.paths.root.parent, "second", **{"cache.views": 1})
    runner.run_cache(second)
    stray = shutil.copytree(folder_of(first), first.paths.cache_root / "cut-9-00000000")
    for folder in (folder_of(first), folder_of(second), stray):
        (folder / "data.zarr/zarr.json").unlink()
    harm(folder_of(first))
    capsys.readouterr()
    assert main(words("verify", second)) == 1
    root = first.paths.root
    advice = [
        "permafrost: 4 damaged files; run `make repair`, which rebuilds only what is bad",
        f"run `make repair CONFIG={root}/config.toml RUN={root}`, for {root} uses {folder_of(first).name}",
        "run `make gc`, which removes what no run asks for: cut-9-00000000",
    ]
    assert sorted(capsys.readouterr().err.strip().split("; ")) == sorted("; ".join(advice).split("; "))
    for call in (words("repair", second), words("repair", first), words("gc", second, "--yes")):
        assert main(call) == 0
    assert main(words("verify", second)) == 0 and not stray.exists()


def test_a_cache_of_an_earlier_format_is_no_damage_and_has_a_remedy(first: Job, capsys: Told) -> None:
    second = in_store(first.paths.root.parent, "second", **{"cache.views": 1})
    runner.run_cache(second)
    stray = shutil.copytree(folder_of(first), first.paths.cache_root / "cut-9-00000000")
    folders = (folder_of(first), folder_of(second), stray)
    for folder in folders:
        earlier(folder)
    capsys.readouterr()
    assert main(words("verify", second)) == 0
    says = "manifest.json has format 1, this version reads 3 and 4; build the cache again"
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(
        (
            f"{folders[0]}: {folders[0]}/{says}, or let {first.paths.root}, which uses it, do that",
            f"{folders[1]}: {folders[1]}/{says} with `make cache-1`",
            f"{stray}: {stray}/{says}, or run `make gc`, which removes it: no run asks for it",
        )
    )
    for call in (words("cache", second, "1"), words("cache", first, "1"), words("gc", second, "--yes")):
        assert main(call) == 0
    capsys.readouterr()
    assert main(words("verify", second)) == 0
    out = capsys.readouterr().out
    assert out.count(": sound, ") == 2 and "format" not in out


def test_a_cache_of_a_later_version_is_told_and_left_to_it(first: Job, capsys: Told) -> None:
    earlier(folder_of(first), version=99)
    before = files_of(folder_of(first))
    capsys.readouterr()
    assert main(words("verify", first)) == 0
    assert capsys.readouterr().out == (
        f"{folder_of(first)}: {folder_of(first)}/manifest.json has format 99, this version reads 4: a later version "
        "made it and may need it; update, or remove the folder\n"
    )
    assert files_of(folder_of(first)) == before


def test_a_store_that_does_not_answer_is_no_damage(first: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(folder: Path) -> None:
        raise StoreUnreachable(f"{folder} cannot be reached (asleep); nothing is lost, run again when it can")

    monkeypatch.setattr(care, "read_manifest", away)
    with pytest.raises(StoreUnreachable, match="nothing is lost"):
        care.run_verify(first)


def test_damage_is_told_where_the_images_are_not(first: Job, capsys: Told) -> None:
    """Who uses which cache is then not known; `repair`, which needs them, says what is missing."""
    harm(folder_of(first))
    capsys.readouterr()
    asked = ["--set", "data.source=nowhere.tar"]
    assert main(words("verify", first, *asked)) == 1
    assert capsys.readouterr().err == (
        "permafrost: 1 damaged files; run `make repair`, which rebuilds only what is bad\n"
    )
    assert main(words("repair", first, *asked)) == 2 and "nowhere.tar" in capsys.readouterr().err


def test_a_repair_trains_nothing_anew(first: Job, capsys: Told) -> None:
    """What made a cache still lies there, whatever a stage would be trained with today."""
    whole, before = files_of(folder_of(first)), weights(first.paths.root, "stage-0")
    harm(folder_of(first))
    asked = ["--set", "train.lr=0.002"]
    capsys.readouterr()
    assert main(words("verify", first, *asked)) == 1 and "run `make repair`, which" in capsys.readouterr().err
    assert main(words("repair", first, *asked)) == 0 and files_of(folder_of(first)) == whole
    after = weights(first.paths.root, "stage-0")
    assert all((after[name] == before[name]).all() for name in before)
    assert main(words("verify", first, *asked)) == 0


@pytest.mark.parametrize("lr", [0.001, 0.002])
def test_weights_that_are_gone_are_trained_again_for_a_repair(first: Job, lr: float, capsys: Told) -> None:
    """As they were, or by what is asked for today, which is another cache."""
    old = folder_of(first)
    whole, model = files_of(old), first.paths.stage(0).model
    harm(old)
    model.write_bytes(model.read_bytes()[:-7])
    asked = ["--set", f"train.lr={lr}"]
    assert main(words("repair", first, *asked)) == 0
    if lr == 0.001:
        assert files_of(old) == whole
        return
    assert f"{old}: the weights that made it are gone; `make gc` removes it\n" in capsys.readouterr().out
    assert main(words("verify", first, *asked)) == 1
    assert f"run `make gc`, which removes what no run asks for: {old.name}" in capsys.readouterr().err
    assert main(words("gc", first, *asked, "--yes")) == 0 and not old.exists()


@pytest.mark.parametrize(
    ("changes", "kept"),
    [({}, 1), ({"cache.keep": "needed"}, 1), ({"cache.refresh": 1, "cache.refresh_ahead": 2}, 3)],
    ids=["all", "needed", "ring"],
)
def test_repair_looks_at_all_that_gc_keeps(first: Job, changes: dict[str, object], kept: int) -> None:
    """Also at the views that are made ahead: what neither mends nor clears away would be damaged for ever."""
    job = in_store(first.paths.root.parent, "first", **changes)
    wanted = Wanted(job.config, job.paths)
    keeps = used(wanted)
    assert len(keeps) == kept and keeps <= set(care.mendable(wanted))


def test_a_store_that_fails_for_a_moment_hides_no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place_of("memory://caches/cut-1-00000000")
    (folder / "receipts").mkdir(parents=True)
    (folder / "receipts/store.json").write_bytes(b"{}")
    memory, failures = type(folder.fs), [OSError("a connection broke")] * 2
    plain = memory.info

    def info(self: object, *given: object, **more: object) -> object:
        if failures:
            raise failures.pop()
        return plain(self, *given, **more)

    monkeypatch.setattr(memory, "info", info)
    before = store_settings()
    use_store(StoreConfig(wait=0.0))
    try:
        assert care.in_progress(folder) and not failures
    finally:
        use_store(before)
