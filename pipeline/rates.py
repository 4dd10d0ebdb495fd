"""How fast a training step is in each arm, at each cut, and what its FLOPs would allow. The arms' steps run in turn,
round after round, so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import torch
from torch.utils.flop_counter import FlopCounterMode

from cache.loader import prefetch
from models.batch import MaskedBatch
from models.mim import MaskedModel
from pipeline.decide import Wanted
from pipeline.work import live_source, masked_build, optimizer_of, stage_source
from stages.device import synchronize
from stages.segment import Segment
from stages.sources import Inputs, Source, StepInputs
from stages.train import build_model, train_step

STEPS = ("e2e", "freeze", "cached", "memory")
MEMORY_BATCHES = 4
Rates = dict[str, list[float]]


@dataclass(frozen=True)
class InMemory:
    """A source's first batches, loaded before the clock starts: what training would cost if loading were free."""

    source: Source
    batches: tuple[StepInputs, ...]

    @classmethod
    def of(cls, source: Source, segment: Segment, batches: int) -> InMemory:
        return cls(source, tuple(source.load(segment, step % segment.steps) for step in range(batches)))

    def load(self, segment: Segment, step: int) -> StepInputs:
        return self.batches[step % len(self.batches)]

    def mask(self, model: MaskedModel, inputs: Inputs) -> MaskedBatch:
        return self.source.mask(model, inputs)


def stage_rates(wanted: Wanted, stage: int, seconds: float, rounds: int) -> Rates:
    """images/s of each arm's step at a stage's cut, one number a round. The weights are a fresh model's: speed only.

    Each arm trains for at least `seconds` in a round; every other round goes backwards, so that a steady drift of the
    machine cancels. `memory` is the cached step on features in memory: what it would cost if loading were free.
    """
    runners = {arm: step_runner(wanted, stage, arm) for arm in STEPS}
    rates: Rates = {arm: [] for arm in STEPS}
    for number in range(rounds):
        for arm in STEPS if number % 2 == 0 else reversed(STEPS):
            rates[arm].append(runners[arm](seconds))
    return rates


def step_runner(wanted: Wanted, stage: int, arm: str) -> Callable[[float], float]:
    """A function that trains an arm for some seconds, after a step that is not counted, and returns images/s."""
    train = wanted.config.train
    segment = wanted.segments[stage] if arm != "e2e" else replace(wanted.segments[stage], cut=0)
    staged = arm in ("cached", "memory")
    model, optimizer = fresh_model(wanted, stage, segment.cut, staged and stage in wanted.cached_stages)
    source = stage_source(wanted, stage) if staged else live_source(wanted, segment)
    if arm == "memory":
        source = InMemory.of(source, segment, MEMORY_BATCHES)
    device = torch.device(train.device)

    def run(seconds: float) -> float:
        torch.set_num_threads(train.threads)
        steps, started, elapsed = 0, 0.0, 0.0
        numbers = (number % segment.steps for number in count())
        load = partial(source.load, segment)
        with prefetch(load, numbers, train.loader_threads, train.prefetch) as batches:
            train_step(model, optimizer, source, next(batches), train)
            synchronize(device)
            started = time.perf_counter()
            while elapsed < seconds:
                train_step(model, optimizer, source, next(batches), train)
                synchronize(device)
                steps, elapsed = steps + 1, time.perf_counter() - started
        return steps * train.batch_size / elapsed

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
    return live / step_flops(wanted, cached, stage_source(wanted, stage), segment)


def step_flops(wanted: Wanted, model: MaskedModel, source: Source, segment: Segment) -> int:
    """FLOPs of one training step's forward and backward, as torch counts them."""
    inputs = source.load(segment, 0).to(wanted.config.train.device)
    with FlopCounterMode(display=False) as counter:
        model(source.mask(model, inputs)).sum().backward()
    return counter.get_total_flops()


def ratios(rates: Rates, above: str, below: str) -> list[float]:
    """Ratio of two arms' rates within each round."""
    return [high / low for high, low in zip(rates[above], rates[below], strict=True)]
