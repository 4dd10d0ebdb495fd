"""The ring of views: while a cached stage trains, its oldest view is replaced by a new one after every `cache.refresh`
epochs. A turn is a cache of its own, whose other views are taken over from the one before, which then goes. Called by
the training of a stage, between two of its segments."""

from __future__ import annotations

import json

from cache.manifest import atomic_write
from cache.place import is_there
from pipeline.building import build_cache
from pipeline.decide import inputs_digest, judge_cache
from pipeline.desk import Desk
from pipeline.sharing import claim, remove_unused


def turn_ring(desk: Desk, stage: int, turns: int) -> None:
    """Have a stage's ring turned so often: build what is new, note it, remove what it replaces.

    A stop in between leaves the new cache half built, or the old one to be removed: the next call sees to both.
    """
    wanted, paths = desk.wanted, desk.wanted.paths.stage(stage)
    need = wanted.features(stage, turns)
    claim(wanted, [need])
    if not judge_cache(wanted, need).current:
        build_cache(desk, need, paths)
    noted = {"turns": turns, "of": inputs_digest(wanted.stage_inputs(stage))}
    atomic_write(paths.ring, json.dumps(noted).encode())
    for before in range(turns):
        spec = wanted.spec(wanted.features(stage, before))
        assert spec is not None, "the stage before has made its weights"
        folder = wanted.cache_folder(spec)
        if is_there(folder) and (why := remove_unused(wanted, folder)):
            desk.log.message(f"kept: {folder}: {why}")
