"""Which run is which, of runs that share a folder of caches: they move, are copied, have the same path elsewhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cache import users as noted
from cache.lock import hold_cache, hold_shard, hold_store
from cache.place import StoreUnreachable, place_of
from cache.users import register, users
from tests.faulty import Fault, FaultyStore
from tests.object_store import ObjectStore


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    register(tmp_path / "store", folder, ["cut-1-x"])
    return folder


def only(store: Path) -> noted.User:
    (user,) = users(store)
    return user


def test_a_run_knows_itself_and_keeps_its_id(run: Path, tmp_path: Path) -> None:
    assert only(tmp_path / "store").is_run(run)
    before = (run / ".id").read_text()
    register(tmp_path / "store", run, ["cut-2-x"])
    assert (run / ".id").read_text() == before and len(before) == 32
    assert only(tmp_path / "store").caches == ("cut-2-x",)


def test_a_run_that_was_moved_is_the_same_run(run: Path, tmp_path: Path) -> None:
    moved = run.rename(tmp_path / "moved")
    assert users(tmp_path / "store") == [], "it is not where it was, and says where it is when it next runs"
    register(tmp_path / "store", moved, ["cut-1-x"])
    assert only(tmp_path / "store").run == str(moved) and only(tmp_path / "store").is_run(moved)
    assert len(list((tmp_path / "store/.permafrost/users").iterdir())) == 1


def test_a_run_that_another_host_of_a_shared_disk_goes_on_with_is_the_same(
    run: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "second")
    assert only(tmp_path / "store").is_run(run) and "no longer there" not in str(only(tmp_path / "store"))
    moved = run.rename(tmp_path / "moved")
    assert only(tmp_path / "store").is_run(moved)
    register(tmp_path / "store", moved, ["cut-2-x"])
    assert (only(tmp_path / "store").host, only(tmp_path / "store").caches) == ("second", ("cut-2-x",))


def test_a_copied_run_is_another_one(run: Path, tmp_path: Path, monkeypatch) -> None:
    store, copy = tmp_path / "store", shutil.copytree(run, tmp_path / "copy")
    assert (copy / ".id").read_text() == (run / ".id").read_text()
    assert not only(store).is_run(copy)
    register(store, copy, ["cut-2-x"])
    assert {(user.run, user.caches) for user in users(store)} == {
        (str(run), ("cut-1-x",)),
        (str(copy), ("cut-2-x",)),
    }
    # The copy lies on another machine, under the path that the original has on its own.
    original = run.rename(tmp_path / "far away")
    copy.rename(run)
    monkeypatch.setattr("socket.gethostname", lambda: "second")
    mine = [user.caches for user in users(store) if user.is_run(run)]
    assert mine == [("cut-2-x",)] and [u.caches for u in users(store) if u.is_run(original)] == [("cut-1-x",)]


@pytest.mark.parametrize("host", ["second", ""])
def test_equal_paths_on_two_machines_are_two_runs(run: Path, tmp_path: Path, monkeypatch, host: str) -> None:
    """Each machine has a disk of its own, and one folder of caches; the hosts may even have one name."""
    store, elsewhere = tmp_path / "store", run.rename(tmp_path / "disk of the first")
    run.mkdir()
    if host:
        monkeypatch.setattr("socket.gethostname", lambda: host)
    register(store, run, ["cut-1-x", "cut-2-x"])
    assert len(users(store)) == 2
    (other,) = [user for user in users(store) if not user.is_run(run)]
    assert other.caches == ("cut-1-x",) and other.run == str(run) and other.is_run(elsewhere)
    of = f" of {other.host}" if host else ""
    assert str(other) == f"{run}{of} (no longer there? delete {other.file})"


def test_what_earlier_versions_noted_goes_by_host_and_path(run: Path, tmp_path: Path, monkeypatch) -> None:
    store = tmp_path / "store"
    file = Path(only(store).file)
    old = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("id", "inode")}
    file.rename(file.with_name("0123456789abcdef.json")).write_text(json.dumps(old))
    assert only(store).is_run(run) and not only(store).is_run(tmp_path)
    register(store, run, ["cut-2-x"])
    assert only(store).caches == ("cut-2-x",), "in place of the old one"
    file.rename(file.with_name("0123456789abcdef.json")).write_text(json.dumps(old))
    monkeypatch.setattr("socket.gethostname", lambda: "second")
    assert not only(store).is_run(run)


@pytest.mark.parametrize("error", [PermissionError, TimeoutError, OSError])
def test_a_run_that_cannot_be_looked_at_is_there(run: Path, tmp_path: Path, monkeypatch, error: type[OSError]) -> None:
    """In another user's home, which nobody else may enter, or on a disk that does not answer."""
    plain = os.stat

    def stat(path: Any, **how: Any) -> os.stat_result:
        if os.fspath(path).startswith(str(run)):
            raise error(path)
        return plain(path, **how)

    monkeypatch.setattr(os, "stat", stat)
    assert only(tmp_path / "store").run == str(run)
    assert str(only(tmp_path / "store")) == f"{run} (not to be seen from here)", "and no advice to delete its note"
    (mine := tmp_path / "mine").mkdir()
    register(tmp_path / "store", mine, ["cut-2-x"])
    assert len(users(tmp_path / "store")) == 2


@pytest.mark.parametrize("there", [True, False], ids=["another folder", "no folder"])
def test_a_run_is_gone_only_for_who_sees_the_folder_in_which_it_lay(tmp_path: Path, there: bool) -> None:
    """Two containers of one host name share a folder of caches, and have folders of their own under the same path; or
    the run's disk is not mounted at the moment."""
    store, home = tmp_path / "store", tmp_path / "home"
    (home / "run").mkdir(parents=True)
    register(store, home / "run", ["cut-1-x"])
    home.rename(tmp_path / "home of the first")
    if there:
        home.mkdir()
    other = only(store)
    assert str(other) == f"{home / 'run'} (no longer there? delete {other.file})"
    if there:
        home.rmdir()
    (tmp_path / "home of the first").rename(home)
    assert only(store).is_run(home / "run")
    shutil.rmtree(home / "run")
    assert users(store) == []


def test_a_folder_of_caches_by_another_name_has_the_same_users(run: Path, tmp_path: Path, monkeypatch) -> None:
    """Mounted elsewhere, too; a copy of it has none of them, whatever it is called."""
    store = tmp_path / "store"
    monkeypatch.setattr(noted, "called", lambda root: f"/mnt{root}")
    assert only(store).is_run(run)
    shutil.copytree(store, tmp_path / "copy")
    assert users(tmp_path / "copy") == []


def test_a_bucket_by_another_name_has_the_same_users(object_store: ObjectStore, tmp_path: Path) -> None:
    url, run = object_store.url(tmp_path / "store"), tmp_path / "run"
    run.mkdir()
    register(place_of(url), run, ["cut-1-x"])
    assert only(place_of(url.replace("s3:", "s3a:"))).is_run(run)
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    assert users(object_store.at(tmp_path / "copy")) == []


def test_what_an_earlier_version_noted_is_never_gone(run: Path, tmp_path: Path) -> None:
    """It did not note in which folder the run lay."""
    file = Path(only(tmp_path / "store").file)
    values = json.loads(file.read_text())
    file.write_text(json.dumps({key: values[key] for key in values.keys() - {"lay_in", "root_inode"}}))
    shutil.rmtree(run)
    assert str(only(tmp_path / "store")) == f"{run} (no longer there? delete {file})"
    file.unlink()
    assert users(tmp_path / "store") == []


def test_a_note_that_a_store_does_not_give_is_not_to_be_deleted(faulty: FaultyStore, tmp_path: Path) -> None:
    """`gc` would end with that advice, and another run's caches then go."""
    store, run = faulty.store.at(tmp_path / "store"), tmp_path / "run"
    run.mkdir()
    register(store, run, ["cut-1-x"])
    faulty.faults = [Fault("status", inside=".json", method=method) for method in ("HEAD", "GET")]
    with pytest.raises(StoreUnreachable, match=r"cannot be reached .* run again") as told:
        users(store)
    assert "delete" not in str(told.value)
    faulty.faults = []
    assert only(store).caches == ("cut-1-x",)


def test_a_note_that_goes_while_notes_are_read_is_of_no_user(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Path(only(tmp_path / "store").file)
    monkeypatch.setattr(noted, "matching", lambda *_: [there.with_name("0123456789abcdef.json"), there])
    assert only(tmp_path / "store").run == str(run)


@pytest.mark.parametrize(("root", "group", "others"), [(0o755, 0, 0), (0o2775, 0o6, 0), (0o777, 0o6, 0o6)])
def test_what_is_noted_is_as_writable_as_the_folder_is(tmp_path: Path, root: int, group: int, others: int) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    for folder in (store, run):
        folder.mkdir()
    store.chmod(root)
    umask = os.umask(0o077)
    try:
        register(store, run, ["cut-1-x"])
        with hold_cache(store / "cut-1-x"), hold_store(store), hold_shard(store / "cut-1-x", "a"):
            found = {path: path.stat().st_mode for path in (store / ".permafrost", *store.rglob(".permafrost/**/*"))}
    finally:
        os.umask(umask)
    assert len(found) >= 11, "five folders, a note, three locks, two of them signed"
    for path, mode in found.items():
        enter = 0o1 if path.is_dir() else 0
        assert (mode >> 3 & 0o7, mode & 0o7) == (group and group | enter, others and others | enter), path
