"""What may befall a cache: killed builders, full disks, bad bytes, other writers, read-only folders, clocks that jump.
Each ends in a correct cache or in one line that names file and remedy."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import open_cache
from cache.errors import CacheError
from cache.layout import Shard
from cache.lock import CacheBusy, aside, hold_cache, hold_shard, hold_store
from cache.manifest import atomic_write, read_manifest, seal
from cache.users import Cost, read_cost, register, users, write_cost
from cache.verify import remove_cache, verify_cache
from cache.writer import create_store, finish, missing_shards, write_rows
from tests.cache.mending import KINDS, VARIANTS, Sound, damage_trial
from tests.cache.trials import BACKENDS, TRIALS, of_backend

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(backend: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    wanted = of_backend(backend)
    folder = tmp_path_factory.mktemp("whole") / "cut-3-00000000"
    wanted.build(folder)
    return folder


def in_python(code: str, *args: object) -> subprocess.Popen[str]:
    """Code in a process of its own, its output to be read."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the caches of all variants are made, by what is trained once."""
    return tmp_path_factory.mktemp("sound")


@pytest.fixture(scope="module", params=VARIANTS)
def sound(trained: Path, request) -> Sound:
    return Sound.build(trained, request.param)


@settings(max_examples=TRIALS or 14, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    picks=st.tuples(st.integers(0, 999), st.integers(0, 999)),
    place=st.integers(0, 2**20),
    mask=st.integers(1, 255),
)
def test_every_damage_is_found_and_mended_to_the_bit(sound: Sound, kind, picks, place, mask) -> None:
    with tempfile.TemporaryDirectory() as trial:
        assert damage_trial(sound, Path(trial) / "store", kind, picks, place, mask) == (True, True)


def test_builds_killed_in_real_processes_end_in_the_same_bits() -> None:
    count = TRIALS or 16
    command = [sys.executable, "-m", "tests.cache.trials", "--damage", "0", "--kills", str(count), "--seed", "7"]
    longest = 300 + 5 * count
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True, timeout=longest).stdout
    assert f"kill -9: {count} trials, {count} found, {count} mended" in told


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel takes no file beyond so many bytes: it stops in the middle of a write, for root as for anyone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("size", [10, 400, 900, 1500, 3000])
def test_a_disk_that_takes_no_more_costs_nothing_that_was_written(
    tmp_path: Path, backend: str, whole: Path, size: int, tree
) -> None:
    wanted, folder = of_backend(backend), tmp_path / "cache"
    with largest_file(size), pytest.raises(CacheError, match=r"cannot write .* \(\d+ bytes\): .*; make room and run"):
        wanted.build(folder)
    assert not list(tmp_path.rglob("*.tmp")), "no half-written file stays"
    kept = set(wanted.layout.shards) - set(missing_shards(folder, wanted.layout))
    _, built = wanted.build(folder)
    assert kept.isdisjoint(built) and tree(folder) == tree(whole)


@contextmanager
def unprivileged() -> Iterator[None]:
    """Without root's right to write anywhere; a user never has it."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def read_only(whole: Path) -> Iterator[Path]:
    """A finished cache in a folder that nobody may write."""
    root = Path(tempfile.mkdtemp())
    folder = root / whole.name
    shutil.copytree(whole, folder)
    for path in (root, *root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    shutil.rmtree(root)


def test_a_read_only_cache_is_read_and_verified_and_says_so_when_written(
    read_only: Path, backend: str, whole: Path, tree
) -> None:
    wanted = of_backend(backend)
    with unprivileged():
        assert open_cache(read_only, verify=True).read([4, 0]).keys == (wanted.keys[4], wanted.keys[0])
        assert verify_cache(read_only) == []
        wanted.build(read_only)  # finished: nothing to do, and nothing tried
        with pytest.raises(CacheError, match=r"cannot write .*locks: Permission denied; make it writable, or set"):
            hold_cache(read_only).__enter__()
        with pytest.raises(CacheError, match=r"cannot write .*: Permission denied; make it writable"):
            register(read_only.parent, read_only, [read_only.name])
        with pytest.raises(CacheError, match=r"cannot remove .*: Permission denied; make the folder writable"):
            remove_cache(read_only)
        with pytest.raises(CacheError, match=r"cannot write .*: Permission denied; make the folder writable and run"):
            of_backend(backend).build(read_only.parent / "another")
    assert tree(read_only) == tree(whole)


def test_a_clock_that_jumps_changes_nothing(tmp_path: Path, backend: str, whole: Path, tree) -> None:
    wanted, folder = of_backend(backend), tmp_path / "cache"
    create_store(folder, wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    first = wanted.layout.shards[0]
    write_rows(folder, wanted.layout, first.view, first.first_row, wanted.block(first))
    for number, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, (0, (0, 2**33, 1e9)[number % 3]))
    assert missing_shards(folder, wanted.layout) == list(wanted.layout.shards[1:])
    wanted.build(folder)
    assert tree(folder) == tree(whole)
    victim = folder / wanted.layout.files(Shard(1, 0, 3))[0]
    content, stat = victim.read_bytes(), victim.stat()
    victim.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size, the same time
    assert [damage.file for damage in verify_cache(folder)] == [victim.relative_to(folder).as_posix()]


def test_a_cache_of_a_later_version_is_not_built_over(tmp_path: Path, backend: str, whole: Path, tree) -> None:
    folder = shutil.copytree(whole, tmp_path / "cache")
    atomic_write(folder / "manifest.json", seal({**read_manifest(whole).to_dict(), "format": 99}))
    before = tree(folder)
    message = f"{re.escape(str(folder))}/manifest.json has format 99, .* a later version made it .* update, or remove"
    with pytest.raises(CacheError, match=message):
        of_backend(backend).build(folder)
    with pytest.raises(CacheError, match=message):
        open_cache(folder)
    assert tree(folder) == before


# --- one writer at a time ---------------------------------------------------------------------------------------------

HOLDS = """
import sys, time
from pathlib import Path
from cache.lock import hold_cache
with hold_cache(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_builder_is_told_who_builds_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    folder, told = tmp_path / "cut-1-00000000", []
    other = in_python(HOLDS, folder)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(CacheBusy, match=rf"the cache at {folder} is busy: process {other.pid} works on it; wait"):
            hold_cache(folder).__enter__()
        with pytest.raises(CacheBusy):
            hold_cache(folder, told.append, lambda: True).__enter__()
        assert told == [f"waiting for the cache at {folder}: process {other.pid} works on it"]
        with hold_cache(tmp_path / "cut-2-00000000"):
            pass  # another cache is no conflict
    finally:
        other.kill()
        other.wait(60)
    started = time.perf_counter()
    with hold_cache(folder):
        assert time.perf_counter() - started < 1


def test_the_second_of_two_builders_waits_and_writes_nothing(tmp_path: Path, example) -> None:
    wanted, folder, order = example(), tmp_path / "cache", []
    entered = threading.Event()

    def build(name: str) -> None:
        with hold_cache(folder, lambda text: order.append("waits")):
            entered.set()
            if name == "first":
                time.sleep(0.3)
            _, shards = wanted.build(folder)
            order.append((name, len(shards)))

    first, second = (threading.Thread(target=build, args=(name,), daemon=True) for name in ("first", "second"))
    first.start()
    assert entered.wait(60)
    second.start()
    first.join(60)
    second.join(60)
    assert order == ["waits", ("first", 6), ("second", 0)] and verify_cache(folder) == []


def test_without_flock_nothing_is_locked_and_no_marker_of_the_dead_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A marker file in its place would stay for ever where its host has died, or is another."""

    def lacking(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    folder = tmp_path / "cut-1-00000000"
    with hold_cache(folder), hold_shard(folder, "view_0-000000000"), hold_store(tmp_path):
        pass
    locks = list((tmp_path / ".permafrost").rglob("*.lock"))
    assert len(locks) == 3
    for lock in locks:
        lock.write_text("4321\nelsewhere\n")
    monkeypatch.setattr("fcntl.flock", lacking)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with hold_cache(folder), hold_shard(folder, "view_0-000000000"), hold_store(tmp_path), hold_cache(folder):
                pass
    assert [lock.read_text() for lock in locks] == ["4321\nelsewhere\n"] * 3


WRITES_HALF = """
import sys
from pathlib import Path
from cache.writer import write_rows
from tests.cache.conftest import make_example
wanted = make_example()
for shard in wanted.layout.shards[int(sys.argv[2])::2]:
    write_rows(Path(sys.argv[1]), wanted.layout, shard.view, shard.first_row, wanted.block(shard))
"""


def test_two_workers_of_one_build_are_no_conflict(tmp_path: Path, example, tree) -> None:
    wanted = example()
    wanted.build(tmp_path / "alone")
    folder = tmp_path / "shared"
    with hold_cache(folder):
        create_store(folder, wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
        workers = [in_python(WRITES_HALF, folder, half) for half in (0, 1)]
        assert [worker.wait(120) for worker in workers] == [0, 0]
        finish(folder, wanted.layout)
    assert tree(folder) == tree(tmp_path / "alone")


def test_two_builders_whom_no_lock_separates_end_in_the_same_bits(tmp_path: Path, example, tree) -> None:
    """As on a shared file system that does not pass `flock` on: both write everything, whole, in any order."""
    wanted, folder = example(), tmp_path / "both"
    wanted.build(tmp_path / "alone")
    create_store(folder, wanted.layout, wanted.labels_N, wanted.keys, wanted.digests_N)
    for shard in wanted.layout.shards:
        for _ in range(2):
            write_rows(folder, wanted.layout, shard.view, shard.first_row, wanted.block(shard))
    finish(folder, wanted.layout)
    late = wanted.layout.shards[2]
    write_rows(folder, wanted.layout, late.view, late.first_row, wanted.block(late))  # after the other has finished
    finish(folder, wanted.layout)
    assert tree(folder) == tree(tmp_path / "alone")


# --- who uses a cache, what it has cost -------------------------------------------------------------------------------


def test_users_are_the_runs_that_are_still_there(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("a", "b")]
    for run in runs:
        run.mkdir()
        register(tmp_path / "store", run, ["cut-1-x", f"cut-2-{run.name}"])
    register(tmp_path / "store", runs[0], ["cut-1-x"])
    assert {(user.run, user.caches) for user in users(tmp_path / "store")} == {
        (str(runs[0]), ("cut-1-x",)),
        (str(runs[1]), ("cut-1-x", "cut-2-b")),
    }
    shutil.copytree(tmp_path / "store", tmp_path / "copy")
    assert users(tmp_path / "copy") == [], "they use what was copied, not the copy"
    shutil.rmtree(runs[1])
    assert [user.run for user in users(tmp_path / "store")] == [str(runs[0])]
    (file,) = [user.file for user in users(tmp_path / "store")]
    Path(file).write_text(json.dumps({"run": str(runs[1]), "host": "elsewhere", "caches": ["cut-1-x"], "root": "r"}))
    (far,) = users(tmp_path / "store")
    assert str(far) == f"{runs[1]} of elsewhere (no longer there? delete {file})", "nobody here knows, so it counts"
    Path(file).write_text("{")
    with pytest.raises(CacheError, match=f"{file} does not say which run uses which caches .*; delete it, and run"):
        users(tmp_path / "store")


def test_what_a_cache_has_cost_goes_with_it(tmp_path: Path, example) -> None:
    folder = tmp_path / "cache"
    assert read_cost(folder) is None
    example().build(folder)
    write_cost(folder, Cost(12.5, 0.5))
    assert read_cost(folder) == Cost(12.5, 0.5) and aside(folder, "manifests", ".json").exists()
    remove_cache(folder)
    assert read_cost(folder) is None and not aside(folder, "manifests", ".json").exists()


# --- how bytes reach the disk, and who reads them ---------------------------------------------------------------------


def test_a_file_is_on_disk_before_it_has_its_name_and_the_name_after(tmp_path: Path, monkeypatch) -> None:
    calls: list[str] = []
    sync, rename = os.fsync, Path.replace

    def noted_sync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        sync(descriptor)

    def noted_rename(source: Path, target: Path) -> Path:
        calls.append("rename")
        return rename(source, target)

    monkeypatch.setattr("cache.manifest.os.fsync", noted_sync)
    monkeypatch.setattr(Path, "replace", noted_rename)
    atomic_write(tmp_path / "x", b"content")
    assert calls == ["file", "rename", "folder"]


FORKS = """
import os, signal, sys
import numpy as np
from cache import open_cache
from cache.loader import prefetch
reader = open_cache(sys.argv[1])
want = reader.read([3, 1]).features_BLD
with prefetch(lambda rows: reader.read(rows), [[0], [1], [2], [3]], 2, 2) as batches:
    next(iter(batches))  # threads of the loader are alive while the process forks
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if (reader.read([3, 1]).features_BLD == want).all() else 3)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_worker_reads_what_its_parent_reads(whole: Path) -> None:
    assert in_python(FORKS, whole).wait(timeout=60) == 0
