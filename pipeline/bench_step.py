"""Where a training step's time goes, and how much of it our way of running the step saves: part of `permafrost bench`.
The straightforward step, eager with torch's fused attention, stands beside what training does, on the same inputs."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from models.mim import MaskedModel
from pipeline.decide import Wanted
from pipeline.feeds import sampling
from pipeline.gauge import step_source
from pipeline.rates import fresh_model
from pipeline.show import console, spread, table
from stages.compiling import compile_learner, compiler
from stages.device import synchronize
from stages.sources import Source, StepInputs
from stages.train import train_step

ROUNDS, STEPS = 6, 2
"""Rounds that alternate between the ways of running a step, and steps of each in a round."""
CURVE = 12
"""Steps over which the losses are compared."""
WAYS, PROFILES = ("straightforward", "ours"), 4
"""What is profiled, and how often."""
KERNELS = ("matrix multiplication",)
"""Kinds of operation whose FLOPs are counted."""
PARTS = {
    "matrix multiplication": ("mm", "addmm", "bmm", "baddbmm", "convolution", "mkldnn", "linear", "sgemm", "gemm"),
    "attention's softmax": ("softmax", "scaled_dot_product", "flash_attention"),
    "GELU": ("gelu",),
    "norms": ("layer_norm",),
    "masks and gathers": ("gather", "scatter", "sort", "index", "argsort", "topk"),
    "copies and casts": ("copy_", "cat", "clone", "contiguous", "to_copy"),
    "optimiser": ("adam", "foreach"),
}
"""Kinds of operation by what their names hold, the first that fits."""


@dataclass(frozen=True)
class Step:
    """A training step on inputs in memory, with a fresh model."""

    model: MaskedModel
    optimizer: torch.optim.Optimizer
    source: Source
    inputs: StepInputs
    wanted: Wanted

    @classmethod
    def of(cls, wanted: Wanted, stage: int) -> Step:
        model, optimizer = fresh_model(wanted, stage, wanted.segments[stage].cut, cached=stage > 0)
        source = step_source(wanted, stage, wanted.segments[stage], model)
        torch.manual_seed(wanted.config.seed)
        return cls(model, optimizer, source, source.load(wanted.segments[stage], 0), wanted)

    def __call__(self) -> torch.Tensor:
        return train_step(self.model, self.optimizer, self.source, self.inputs, self.wanted.config.train)


def ways(wanted: Wanted, stage: int) -> dict[str, Callable[[], Step]]:
    """How a step can be run, the straightforward way first."""

    def made(attention: str, compiled: bool) -> Step:
        step = Step.of(wanted, stage)
        visible = sampling(wanted).keep(0.0)
        step.model.set_attention(attention, wanted.config.train.device, visible)
        if compiled:
            compile_learner(step.model)
        return step

    found = {"straightforward": lambda: made("fused", False), "ours": lambda: made("auto", False)}
    return found | ({"ours, compiled": lambda: made("auto", True)} if compiler() else {})


def bench_steps(wanted: Wanted) -> dict[str, Any]:
    """At the first and the last cut: each way's seconds a step over the straightforward ones, its start-up, and the
    largest relative difference of its losses over some steps."""
    torch.set_num_threads(wanted.config.train.threads)
    found: dict[str, Any] = {}
    rows = table("step", "cut", "speed over the straightforward step", "first step s", "losses differ by")
    for stage in sorted({0, len(wanted.segments) - 1}):
        made = {name: make() for name, make in ways(wanted, stage).items()}
        start = {name: seconds_of(step, 1) for name, step in made.items()}
        curves = {name: [float(step()[0]) for _ in range(CURVE)] for name, step in made.items()}
        times: dict[str, list[float]] = {name: [] for name in made}
        for number in range(ROUNDS):
            for name in made if number % 2 == 0 else reversed(made):
                times[name].append(seconds_of(made[name], STEPS))
        cut = wanted.segments[stage].cut
        for name in made:
            speed = [base / mine for base, mine in zip(times["straightforward"], times[name], strict=True)]
            apart = largest_difference(curves[name], curves["straightforward"])
            found[f"cut {cut}, {name}"] = {"speed": speed, "first_step_seconds": start[name], "losses_differ": apart}
            rows.add_row(name, str(cut), spread(speed), f"{start[name]:.1f}", f"{apart:.1e}")
    console().print(rows)
    return found


def seconds_of(step: Step, steps: int) -> float:
    """Seconds of a step, the mean of some."""
    device = torch.device(step.wanted.config.train.device)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - started) / steps


def largest_difference(mine: list[float], theirs: list[float]) -> float:
    """The largest relative difference of two curves; none may hold what is no number."""
    assert all(map(math.isfinite, (*mine, *theirs)))
    return max(abs(one - other) / abs(other) for one, other in zip(mine, theirs, strict=True))


def profile_steps(wanted: Wanted) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of a step by kind of operation at every cut, straightforward and ours, a number a round; prints the
    medians, whose sum is torch's own work."""
    torch.set_num_threads(wanted.config.train.threads)
    stages = range(len(wanted.segments))
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(PROFILES):
        for stage in stages if number % 2 == 0 else reversed(stages):
            for name in WAYS:
                by_part = found.setdefault(f"cut {wanted.segments[stage].cut}, {name}", {})
                for part, milliseconds in profile_step(ways(wanted, stage)[name]()).items():
                    by_part.setdefault(part, []).append(milliseconds)
    found = {f"cut {one.cut}, {way}": found[f"cut {one.cut}, {way}"] for one in wanted.segments for way in WAYS}
    rows = table("milliseconds of a step", *found)
    for part in (*PARTS, "other"):
        rows.add_row(part, *(f"{statistics.median(by_part[part]):.1f}" for by_part in found.values()))
    whole = ([sum(one) for one in zip(*by_part.values(), strict=True)] for by_part in found.values())
    rows.add_row("all", *(f"{statistics.median(rounds):.1f}" for rounds in whole))
    console().print(rows)
    return found


def kernel_bounds(wanted: Wanted, parts: dict[str, dict[str, list[float]]]) -> dict[int, list[float]]:
    """By cut, a number a round: what skipping would give if a step were nothing but its matrix multiplications, at the
    speed that they have in it. It is the bound by FLOPs, corrected by the efficiency of either step's own kernels."""
    live, *later = (
        [sum(both) for both in zip(*(parts[f"cut {one.cut}, ours"][part] for part in KERNELS), strict=True)]
        for one in wanted.segments
    )
    return {
        one.cut: [whole / mine for whole, mine in zip(live, cached, strict=True)]
        for one, cached in zip(wanted.segments[1:], later, strict=True)
    }


def profile_step(step: Step, steps: int = 3) -> dict[str, float]:
    """Milliseconds of a step by kind of operation, measured by torch's profiler."""
    cuda = step.wanted.config.train.device.startswith("cuda")
    for _ in range(2):
        step()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as watched:
        for _ in range(steps):
            step()
    spent: Counter[str] = Counter(dict.fromkeys((*PARTS, "other"), 0))
    for event in watched.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        spent[part_of(event.key)] += micros
    return {part: micros / 1e3 / steps for part, micros in spent.items()}


def part_of(operation: str) -> str:
    """The kind that an operation belongs to, by its name."""
    name = operation.lower()
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "other")
