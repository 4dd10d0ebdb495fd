"""Caches that several runs share (`cache.root`, CACHE_ROOT): which of them this run uses, noted where other runs look
before they clear up. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cache.errors import CacheError, MissingCache
from cache.lock import ASIDE, CacheBusy, hold_cache, hold_store
from cache.users import User, register, users
from cache.verify import remove_cache
from pipeline.decide import Wanted, all_needs, judge_stage
from pipeline.desk import Desk
from pipeline.needs import Need
from pipeline.remaining import needed_now


def asked_for(wanted: Wanted, more: Iterable[Need] = ()) -> list[Need]:
    """The caches that the run's settings ask for, with those that they continue, parents first."""
    found: list[Need] = []
    for need in [*all_needs(wanted), *made_ahead(wanted), *more]:
        line = [need]
        while parent := line[0].parent:
            line.insert(0, parent)
        found += [one for one in line if one not in found]
    return found


def used(wanted: Wanted, more: Iterable[Need] = ()) -> set[Path]:
    """Where the caches lie that the run's settings ask for and whose identity is known; with `cache.keep=needed` those
    that are still needed, and that of fine-tuning."""
    if wanted.config.cache.keep == "needed":
        tuned = [need for need in all_needs(wanted) if need.tunes]
        needs = [*needed_now(wanted, [*tuned, *more]), *made_ahead(wanted)]
    else:
        needs = asked_for(wanted, more)
    return {wanted.cache_folder(spec) for spec in map(wanted.spec, needs) if spec}


def made_ahead(wanted: Wanted) -> list[Need]:
    """The next generations of every stage's ring of views, which are made before the stage comes to them."""
    ahead = wanted.config.cache.refresh_ahead
    return [
        wanted.features(stage, wanted.turns(stage) + later)
        for stage in range(1, len(wanted.segments))
        if ahead and not judge_stage(wanted, stage).current
        for later in range(1, ahead + 1)
    ]


def claim(desk: Desk, more: Iterable[Need] = ()) -> None:
    """Note which caches the run uses, before it looks whether they are there. A store that cannot be written is read
    all the same."""
    wanted = desk.wanted
    root = wanted.paths.cache_root
    try:
        register(root, wanted.paths.root, [folder.name for folder in used(wanted, more)])
    except CacheError:
        desk.say_once(
            f"this run cannot be noted as a user of {root}: the owner's gc may remove what it reads; ask for write "
            f"access to {root / ASIDE}"
        )


def other_users(wanted: Wanted, folder: Path) -> list[User]:
    """The other runs that use a cache."""
    run = wanted.paths.root
    return [user for user in users(wanted.paths.cache_root) if folder.name in user.caches and not user.is_run(run)]


def remove_unused(wanted: Wanted, folder: Path) -> str:
    """Remove a cache unless somebody builds it or has begun to use it; why it stays, or nothing."""
    try:
        with hold_cache(folder), hold_store(wanted.paths.cache_root):
            if others := other_users(wanted, folder):
                return f"used by {', '.join(map(str, others))}"
            with suppress(MissingCache):  # another `gc` was here
                remove_cache(folder)
    except CacheBusy as error:
        return str(error)
    return ""
