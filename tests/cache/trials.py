"""Damage, many times over: `python -m tests.cache.trials --damage 1000 --kills 100` flips, cuts, empties, deletes and
exchanges files of finished caches of both backends, which `repair` then mends, and kills builds in real processes, and
counts what was found and what was mended to the bit. The suite runs a few of the same trials; PERMAFROST_TRIALS says
how many."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from cache.lock import hold_cache
from cache.verify import verify_cache
from cache.writer import missing_shards
from tests.cache.conftest import Example, files_of, make_example
from tests.cache.mending import KINDS, VARIANTS, Sound, damage_trial

BACKENDS = ("zarr", "webdataset")
TRIALS = int(os.environ.get("PERMAFROST_TRIALS", "0"))
"""How many trials of each kind the suite runs; 0 leaves it at a few."""


class Count(NamedTuple):
    trials: int = 0
    found: int = 0
    mended: int = 0

    def __str__(self) -> str:
        return f"{self.trials} trials, {self.found} found, {self.mended} mended"


def of_backend(backend: str) -> Example:
    """What a cache of four shards of two views holds, in a backend."""
    made = make_example(num_samples=5, shard_rows=3, groups=2)
    return replace(made, layout=replace(made.layout, backend=backend))


def damage_trials(count: int, seed: int) -> Count:
    """Files of encoded caches damaged and mended by `repair`, as `damage_trial` counts them; names what failed."""
    chance, total = random.Random(seed), Count()
    with tempfile.TemporaryDirectory() as place:
        sound = {variant: Sound.build(Path(place), variant) for variant in VARIANTS}
        for number in range(count):
            variant = tuple(VARIANTS)[number % len(VARIANTS)]
            kind, mask = KINDS[number // len(VARIANTS) % len(KINDS)], chance.randrange(1, 256)
            picks, at = (chance.randrange(1000), chance.randrange(1000)), chance.randrange(2**20)
            store = Path(place) / f"trial-{number}"
            found, mended = damage_trial(sound[variant], store, kind, picks, at, mask)
            if not (found and mended):
                print(f"trial {number}: {variant}, {kind} {picks} {at} {mask}: {found=} {mended=}", flush=True)
            total = Count(total.trials + 1, total.found + found, total.mended + mended)
            shutil.rmtree(store)
    return total


LONGEST = 60
"""Seconds after which a forked build hangs; it takes less than one."""


def in_a_process(work: Callable[[], object], after: float | None = None, at: int | None = None) -> int:
    """Does something in a forked process, which is killed `after` seconds, or by itself `at` its n-th call to the disk;
    the signal that ended it, 0 for none."""
    child = os.fork()
    if not child:
        status = 1
        signal.alarm(LONGEST)
        try:
            if at is not None:
                kill_at(at)
            work()
            status = 0
        finally:
            os._exit(status)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGALRM, f"a build hung for {LONGEST} s"
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0, "a build that nobody killed failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def kill_at(call: int) -> None:
    """Lets this process end without warning at the n-th of its calls that change the disk."""
    left = [call]

    def dying(function: Callable) -> Callable:
        def instead(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return instead

    for owner, name in ((os, "fsync"), (os, "replace"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
        setattr(owner, name, dying(getattr(owner, name)))
    plain = Path.open
    Path.open = dying(plain)  # type: ignore[method-assign]


def resumed(folder: Path, wanted: Example, whole: Path) -> tuple[bool, bool]:
    """(found, mended) of a build that was killed, as `kill_trials` counts them."""
    found = not (folder / "manifest.json").exists() or not verify_cache(folder)
    kept = set(wanted.layout.shards) - set(missing_shards(folder, wanted.layout))
    with hold_cache(folder):  # the dead process holds nothing
        _, built = wanted.build(folder)
    return found, files_of(folder) == files_of(whole) and kept.isdisjoint(built)


def kill_trials(count: int, seed: int) -> Count:
    """Builds killed at a random moment or a random call to the disk: found is that what is left is never taken for a
    finished cache unless it is whole, mended that the next build ends in the same bits and writes no good shard again.
    """
    chance, total = random.Random(seed), Count()
    with tempfile.TemporaryDirectory() as place:
        wholes, seconds = {}, 0.0
        for backend in BACKENDS:
            wanted = of_backend(backend)
            started = time.perf_counter()
            in_a_process(lambda wanted=wanted, backend=backend: wanted.build(Path(place) / backend / "whole"))
            seconds = max(seconds, time.perf_counter() - started)
            wholes[backend] = (wanted, Path(place) / backend / "whole")
        while total.trials < count:
            number = total.trials
            wanted, whole = wholes[BACKENDS[number % 2]]
            folder = Path(place) / f"trial-{number}" / "cache"

            def build(folder: Path = folder, wanted: Example = wanted) -> None:
                with hold_cache(folder):
                    wanted.build(folder)

            after, at = chance.uniform(0, seconds), chance.randrange(1, 160)
            in_time = number // 2 % 2
            if in_a_process(build, after if in_time else None, None if in_time else at) == signal.SIGKILL:
                found, mended = resumed(folder, wanted, whole)
                total = Count(number + 1, total.found + found, total.mended + mended)
            shutil.rmtree(folder.parent, ignore_errors=True)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damage", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    # First what forks: mending starts threads, and a fork takes their locks along.
    print(f"kill -9: {kill_trials(asked.kills, asked.seed)}", flush=True)
    print(f"damage: {damage_trials(asked.damage, asked.seed)}", flush=True)


if __name__ == "__main__":
    main()
