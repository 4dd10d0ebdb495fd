"""How fast a training step is in each arm, at each cut, and what its FLOPs would allow. The arms' steps run in turn,
round after round, so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from cache.buffers import FRESH, Buffers
from models.batch import MaskedBatch
from models.mim import MaskedModel
from pipeline.decide import Wanted
from pipeline.feeds import live_source, source_for
from pipeline.work import masked_build, optimizer_of
from stages.compiling import compile_learner, compiles
from stages.device import synchronize
from stages.segment import Segment
from stages.sources import Inputs, Source, StepInputs
from stages.train import LOG_EVERY, build_model, loader, train_step

STEPS = ("e2e", "freeze", "cached", "memory", "loader")
"""What is timed: the three arms, the cached step on features in memory, the loader without a step."""
MEMORY_BATCHES = 4
WAITING = "waiting"
Rates = dict[str, list[float]]


class Pace(NamedTuple):
    """How an arm trained."""

    images_per_second: float
    waiting: float
    """Share of its time spent waiting for batches."""


@dataclass(frozen=True)
class InMemory:
    """A source's first batches, loaded before the clock starts: what training would cost if loading were free."""

    source: Source
    batches: tuple[StepInputs, ...]

    @classmethod
    def of(cls, source: Source, segment: Segment, batches: int, device: str) -> InMemory:
        """On a GPU's host in page-locked memory, as the loader's ring is."""
        steps = [step % segment.steps for step in range(batches)]
        if not device.startswith("cuda"):
            return cls(source, tuple(source.load(segment, step) for step in steps))
        return cls(source, tuple(source.load(segment, step, Buffers(device)) for step in steps))

    def load(self, segment: Segment, step: int, into: Buffers = FRESH) -> StepInputs:
        return self.batches[step % len(self.batches)]

    def mask(self, model: MaskedModel, inputs: Inputs) -> MaskedBatch:
        return self.source.mask(model, inputs)


def stage_rates(wanted: Wanted, stage: int, seconds: float, rounds: int) -> Rates:
    """images/s of each arm's step at a stage's cut, one number a round. The weights are a fresh model's: speed only.

    Each arm trains for at least `seconds` in a round; every other round goes backwards, so that a steady drift of the
    machine cancels. `memory` is the cached step on features in memory: what it would cost if loading were free.
    `loader` are the images/s that the loader's threads give when nothing else runs, `waiting` no rate but the share of
    the cached arm's time that it waits for batches.
    """
    runners = {arm: step_runner(wanted, stage, arm) for arm in STEPS if arm != "loader"}
    load = loader_runner(wanted, stage)
    rates: Rates = {arm: [] for arm in (*STEPS, WAITING)}
    for number in range(rounds):
        for arm in STEPS if number % 2 == 0 else reversed(STEPS):
            if arm == "loader":
                rates[arm].append(load(seconds))
                continue
            pace = runners[arm](seconds)
            rates[arm].append(pace.images_per_second)
            if arm == "cached":
                rates[WAITING].append(pace.waiting)
    return rates


def step_runner(wanted: Wanted, stage: int, arm: str) -> Callable[[float], Pace]:
    """A function that trains an arm for some seconds, after a step that is not counted and, where the arm trains
    compiled, is the one that compiles; it says how fast."""
    train = wanted.config.train
    segment = wanted.segments[stage] if arm != "e2e" else replace(wanted.segments[stage], cut=0)
    staged = arm in ("cached", "memory")
    model, optimizer = fresh_model(wanted, stage, segment.cut, staged and stage in wanted.cached_stages)
    source = source_for(wanted, stage) if staged else live_source(wanted, segment)
    if arm == "memory":
        source = InMemory.of(source, segment, MEMORY_BATCHES, train.device)
    if compiles(train, model, first_part(wanted, stage, arm).steps):
        compile_learner(model)
    device = torch.device(train.device)

    def run(seconds: float) -> Pace:
        torch.set_num_threads(train.threads)
        steps, started, elapsed = 0, 0.0, 0.0
        numbers = (number % segment.steps for number in count())
        with loader(source, segment, numbers, train, wanted.config.cache.memory) as batches:
            train_step(model, optimizer, source, next(batches), train)
            synchronize(device)
            before, started = batches.spent, time.perf_counter()
            while elapsed < seconds:
                for _ in range(unwatched(train.device)):
                    train_step(model, optimizer, source, next(batches), train)
                    steps += 1
                synchronize(device)
                elapsed = time.perf_counter() - started
            waited = batches.spent.since(before).wait_seconds
        return Pace(steps * train.batch_size / elapsed, waited / elapsed)

    return run


def first_part(wanted: Wanted, stage: int, arm: str) -> Segment:
    """What an arm trains from a stage's start on before more blocks freeze, whose length says whether it compiles."""
    if arm == "e2e":
        return wanted.segments[stage]
    return (wanted.parts(stage) if arm == "freeze" else wanted.asked(stage))[0]


def unwatched(device: str) -> int:
    """Steps between two looks at the clock. A GPU works behind the host, and waiting for it at every step would hold
    both up; training reads its losses as seldom."""
    return LOG_EVERY if device.startswith("cuda") else 1


def loader_runner(wanted: Wanted, stage: int) -> Callable[[float], float]:
    """A function that loads a stage's batches for some seconds and returns images/s."""
    train, segment, source = wanted.config.train, wanted.segments[stage], source_for(wanted, stage)

    def run(seconds: float) -> float:
        batches, elapsed = 0, 0.0
        numbers = (number % segment.steps for number in count())
        with loader(source, segment, numbers, train, wanted.config.cache.memory) as loaded:
            next(loaded)
            started = time.perf_counter()
            while elapsed < seconds:
                next(loaded)
                batches, elapsed = batches + 1, time.perf_counter() - started
        return batches * train.batch_size / elapsed

    return run


def fresh_model(
    wanted: Wanted, stage: int, cut: int, cached: bool, entry: int | None = None
) -> tuple[MaskedModel, torch.optim.Optimizer]:
    model = build_model(masked_build(wanted, stage, cached), cut, wanted.config.train.device, entry)
    return model, optimizer_of(wanted, model)


def flop_bound(wanted: Wanted, stage: int) -> float:
    """FLOPs of an e2e step over those of a cached step at the stage's cut: the speed-up that skipping could give."""
    segment = wanted.segments[stage]
    e2e, _ = fresh_model(wanted, stage, 0, cached=False)
    cached, _ = fresh_model(wanted, stage, segment.cut, stage in wanted.cached_stages)
    live = step_flops(wanted, e2e, live_source(wanted, replace(segment, cut=0)), segment)
    return live / step_flops(wanted, cached, source_for(wanted, stage), segment)


def step_flops(wanted: Wanted, model: MaskedModel, source: Source, segment: Segment) -> int:
    """FLOPs of one training step's forward and backward, as torch counts them."""
    inputs = source.load(segment, 0).to(wanted.config.train.device)
    with FlopCounterMode(display=False) as counter:
        model(source.mask(model, inputs)).sum().backward()
    return counter.get_total_flops()


def ratios(rates: Rates, above: str, below: str) -> list[float]:
    """Ratio of two arms' rates within each round."""
    return [high / low for high, low in zip(rates[above], rates[below], strict=True)]
