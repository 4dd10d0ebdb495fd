"""`verify` of a folder that another run clears up meanwhile: what that removes is no damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache.lock import hold_cache
from cache.manifest import MANIFEST
from cache.verify import drop_manifest, remove_cache
from pipeline import care
from pipeline.job import RunFailed
from tests.pipeline.toy import job

Told = pytest.CaptureFixture[str]


@pytest.fixture
def folders(copy: Path) -> list[Path]:
    return care.caches(job(copy))


def before(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path, act: Callable[[Path], object]) -> None:
    """Lets something happen to a cache just before a function of `care` looks at it."""
    plain = getattr(care, name)

    def late(place: Path, *args: Any) -> Any:
        if place == folder and folder.exists():
            act(folder)
        return plain(place, *args)

    monkeypatch.setattr(care, name, late)


@pytest.mark.parametrize("looks", ["check", "verify_cache", "size"])
def test_a_cache_that_is_removed_meanwhile(
    copy: Path, folders: list[Path], looks: str, monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    """Before its manifest is read, before its files are, and once they are found sound."""
    before(monkeypatch, looks, folders[0], remove_cache)
    care.run_verify(job(copy))
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"{folders[0]}: removed meanwhile"
    assert len(others) == len(folders) - 1 > 0 and all(": sound, " in line for line in others)


def test_a_cache_that_goes_while_it_is_hashed(
    copy: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    def run(function: Callable[[Any], Any], tasks: Any) -> Any:
        shutil.rmtree(folders[0], ignore_errors=True)
        return map(function, tasks)

    plain = care.verify_cache
    monkeypatch.setattr(care, "verify_cache", lambda folder, _: plain(folder, run))
    care.run_verify(job(copy))
    out = capsys.readouterr().out
    assert out.startswith(f"{folders[0]}: removed meanwhile\n") and out.count(": sound, ") == len(folders) - 1


def test_a_cache_that_is_being_removed(
    copy: Path, folders: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: Told
) -> None:
    """Its manifest goes first, then file after file; without somebody who holds it that is damage."""
    before(monkeypatch, "check", folders[0], drop_manifest)
    with hold_cache(folders[0]):
        care.run_verify(job(copy))
    out = capsys.readouterr().out
    assert f"{folders[0]}: the cache at {folders[0]} is busy: process " in out and "damaged" not in out
    with pytest.raises(RunFailed, match="1 damaged files"):
        care.run_verify(job(copy))


def test_damage_of_a_cache_that_somebody_holds_is_damage(copy: Path, folders: list[Path]) -> None:
    next(folders[0].rglob("features/c/0/0/0")).write_bytes(b"cut short")
    with hold_cache(folders[0]), pytest.raises(RunFailed, match="1 damaged files"):
        care.run_verify(job(copy))
    assert (folders[0] / MANIFEST).exists()
