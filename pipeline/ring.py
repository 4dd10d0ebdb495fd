"""The ring of views: while a cached stage trains, its oldest view is replaced by a new one after every `cache.refresh`
epochs. A turn is a cache of its own, whose other views are taken over from the one before, which then goes. With
`cache.refresh_ahead` the caches of the next turns are made while the stage trains. Called by the training of a stage,
between two of its segments."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch

from cache.manifest import atomic_write
from cache.place import is_there
from pipeline.ahead import Ahead
from pipeline.building import Beside, build_cache, encode_job, sweeping
from pipeline.cluster import local_processes
from pipeline.decide import judge_cache
from pipeline.desk import Desk
from pipeline.inputs import inputs_digest
from pipeline.seconds import keep_cost, waited_seconds
from pipeline.sharing import claim, remove_unused
from pipeline.tasks import RunTasks
from stages.encode import frozen_encoder
from stages.segment import Segment


@contextmanager
def ring_of(desk: Desk, stage: int) -> Iterator[Ring]:
    """The ring of a stage that is trained within; what was made ahead and is not needed goes when the stage has ended,
    and stays when it was interrupted."""
    ring = Ring(desk, stage)
    try:
        yield ring
    finally:
        ring.close()
    ring.clear()


class Ring:
    """A stage's ring of views. It turns where the stage's segments begin, which the settings alone say: when a view was
    finished has no say in which one a step reads."""

    def __init__(self, desk: Desk, stage: int) -> None:
        wanted = desk.wanted
        self.desk, self.stage, self.paths = desk, stage, wanted.paths.stage(stage)
        self.turns, self._threads = 0, 0
        asked = wanted.asked(stage)
        self.last = wanted.generation(asked[-1], stage) if asked and wanted.refresh(stage) else 0
        self.ahead = wanted.config.cache.refresh_ahead
        self.inside = not wanted.config.cluster.remote and not local_processes(
            wanted.config.cluster, wanted.config.train.device
        )
        self._makes: Ahead[RunTasks] = Ahead(self._start, self._make, desk.log.message, desk.job.stop)

    def turn(self, segment: Segment) -> None:
        """Turn as often as a segment of the stage asks for: build what is new, or wait for it, note it, remove what it
        replaces, and let the next views be made.

        A stop in between leaves the new cache half built, or the old one to be removed: the next call sees to both.
        """
        desk, wanted, stage = self.desk, self.desk.wanted, self.stage
        turns = self.turns = wanted.generation(segment, stage)
        need = wanted.features(stage, turns)
        furthest = min(turns + self.ahead, self.last)
        claim(desk, [wanted.features(stage, one) for one in range(turns, furthest + 1)])
        noted, began = wanted.turns(stage), time.perf_counter()
        waited = waited_seconds(wanted, stage) if turns else 0.0
        try:
            self._makes.wait(turns)
            if not judge_cache(wanted, need).current:
                build_cache(desk, need, self.paths)
            noted = turns
        finally:
            seconds = time.perf_counter() - began if turns else 0.0
            self._note(noted, waited + seconds)
        if turns:
            views = need.draft.first_view + need.draft.views
            told = {"epoch": segment.trained(0), "generation": turns, "new_view": views - 1}
            desk.log({"stage": stage, **told, "refresh_wait_seconds": seconds})
        for before in range(turns):
            self._remove(before)
        if furthest > turns:
            self._allow(turns + 1, furthest)

    def close(self) -> None:
        """Let nothing more be made; what is half made stays."""
        self._makes.close()

    def clear(self) -> None:
        """Remove what was made ahead and the stage, which has ended, did not come to."""
        for later in range(self.turns + 1, self.last + 1):
            self._remove(later)

    def _note(self, turns: int, waited: float) -> None:
        of = inputs_digest(self.desk.wanted.stage_inputs(self.stage))
        self.paths.root.mkdir(parents=True, exist_ok=True)
        atomic_write(self.paths.ring, json.dumps({"turns": turns, "of": of, "waited": waited}).encode())

    def _remove(self, generation: int) -> None:
        wanted = self.desk.wanted
        spec = wanted.spec(wanted.features(self.stage, generation))
        assert spec is not None, "the stage before has made its weights"
        folder = wanted.cache_folder(spec)
        if is_there(folder):
            keep_cost(wanted, self.paths, spec)
            if why := remove_unused(wanted, folder):
                self.desk.log.message(f"kept: {folder}: {why}")

    # --- ahead --------------------------------------------------------------------------------------------------------

    def _allow(self, first: int, last: int) -> None:
        """Let generations be made while the one before them is trained on."""
        if self.inside:
            # Making a model draws from torch's one generator, from which a training step may draw, too: before it does.
            job = encode_job(self.desk.wanted, self.desk.wanted.features(self.stage, first))
            spec = job.layout.spec
            frozen_encoder(job.weights, spec.weights, spec.cut, job.model, job.device)
            self._threads = torch.get_num_threads()
            if first == 1:
                self.desk.log.message(
                    f"stage {self.stage}: the next views are encoded in this process, on the cores that train; "
                    "cluster.workers=1 gives them a process of their own, cluster.address other machines"
                )
        self._makes.allow(first, last)
        if self.inside:  # a moment; Dask hooks into collecting garbage, which must not be under way in another thread
            self._makes.started.wait()

    def _start(self) -> AbstractContextManager[RunTasks]:
        return sweeping(self.desk, self._makes.stopping.is_set)

    def _make(self, generation: int, run: RunTasks) -> None:
        beside = replace(self.desk, job=replace(self.desk.job, stop=self._makes.stopping))
        threads = self._threads if self.inside else 0  # libraries have one number of threads for a whole process
        build_cache(beside, self.desk.wanted.features(self.stage, generation), self.paths, Beside(run, threads))
