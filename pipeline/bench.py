"""`permafrost bench`: what a training step costs, measured side by side: in each arm at each cut, and by method
(target, heads, share decoded) live and at the last cut. What is quoted is medians of ratios within a round, with their
spread."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from cache.manifest import atomic_write
from models.config import TeacherConfig
from pipeline.bench_cache import bench_cache
from pipeline.bench_encode import bench_encode
from pipeline.bench_step import bench_steps, kernel_bounds, profile_steps
from pipeline.checks import check
from pipeline.config import ConfigError
from pipeline.decide import Wanted
from pipeline.desk import Desk, at_work
from pipeline.gauge import seconds_of, step_source
from pipeline.job import Job
from pipeline.rates import STEPS, WAITING, Rates, flop_bound, fresh_model, ratios, stage_rates
from pipeline.reading import parse
from pipeline.runner import ensure_cache
from pipeline.show import console, spread, table
from stages.train import train_step

ROUNDS = 6


def run_bench(job: Job) -> None:
    """Every arm's step at every cut, every method's, and the cache; prints medians and spread, writes bench.json."""
    with at_work(job) as desk:
        found: dict[str, Any] = {"arms": bench_arms(desk), "steps": bench_steps(desk.wanted)}
        found["parts"] = profile_steps(desk.wanted)
        found["kernel_bounds"] = bench_bounds(desk.wanted, found)
        found["methods"] = bench_methods(desk.wanted)
        found["cache"] = bench_cache(job.config.bench, job.paths.root)
        found["cache"]["encode"] = bench_encode(desk)
        atomic_write(job.paths.root / "bench.json", (json.dumps(found, indent=2) + "\n").encode())


def bench_arms(desk: Desk) -> list[dict[str, Any]]:
    """images/s of every arm's step at every cut, on the run's own caches, and what share of it the cached one waits."""
    stages = range(1, len(desk.wanted.segments))
    heads = ("cut", "e2e", "freeze", "cached", "step alone", "loader alone", "cached / e2e", "FLOP bound")
    rows, told = table(*heads, "cached / step alone", "cached waits"), []
    found = []
    for stage in stages:
        ensure_cache(desk, stage)
        rates = stage_rates(desk.wanted, stage, seconds=2.0, rounds=ROUNDS)
        bound = flop_bound(desk.wanted, stage)
        rows.add_row(
            str(desk.wanted.segments[stage].cut),
            *(f"{statistics.median(rates[arm]):.0f}" for arm in STEPS),
            spread(ratios(rates, "cached", "e2e")),
            f"{bound:.2f}",
            spread(ratios(rates, "cached", "memory")),
            f"{statistics.median(rates[WAITING]):.1%}",
        )
        told.append(f"cut {desk.wanted.segments[stage].cut}: {bounding(rates)}")
        waiting = rates.pop(WAITING)
        found.append({"cut": desk.wanted.segments[stage].cut, "flop_bound": bound, "images_per_second": rates})
        found[-1]["cached_waiting"] = waiting
    console().print(rows)
    for line in told:
        console().print(line)
    return found


def bench_bounds(wanted: Wanted, found: dict[str, Any]) -> dict[int, list[float]]:
    """The speed-up at each cut beside what FLOPs, and the kernels as fast as they are, would give."""
    bounds = kernel_bounds(wanted, found["parts"])
    rows = table("cut", "cached / e2e", "FLOP bound", "kernels' bound", "of the kernels' bound")
    for arms in found["arms"]:
        speed = statistics.median(ratios(arms["images_per_second"], "cached", "e2e"))
        bound = bounds[arms["cut"]]
        share = f"{speed / statistics.median(bound):.2f}"
        rows.add_row(str(arms["cut"]), f"{speed:.2f}", f"{arms['flop_bound']:.2f}", spread(bound), share)
    console().print(rows)
    return bounds


def bounding(rates: Rates) -> str:
    """What bounds cached training, from what it, its step alone and its loader alone reach."""
    real, step, loading = (statistics.median(rates[name]) for name in ("cached", "memory", "loader"))
    share = f"training reaches {real / min(step, loading):.2f} of it"
    if loading < step:
        return f"the loader bounds ({loading:.0f} images/s, the step could {step:.0f}); {share}"
    return f"the step bounds ({step:.0f} images/s, the loader could {loading:.0f}); {share}"


def methods(depth: int) -> dict[str, dict[str, Any]]:
    """Settings by method; the first is what the others are compared with. Four heads stand where LocalMIM's do."""
    four, local = [2, 4, depth - 2, depth], {"heads.scales": [4, 2, 1, 0.5], "target.kind": "hog"}
    return {
        "pixels, one decoder": {},
        "hog": {"target.kind": "hog"},
        "features": {"target.kind": "features"},
        "teacher, frozen": {"target.kind": "teacher"},
        "teacher, moving average": {"target.kind": "teacher", "teacher.kind": "ema"},
        "1 head": {"heads.blocks": [depth]},
        "4 heads": {"heads.blocks": four},
        "4 heads, hog, scales 4 2 1 ½": {"heads.blocks": four} | local,
        "a head after every block": {"heads.blocks": list(range(1, depth + 1))},
        "half of the hidden tokens decoded": {"decoder.share": 0.5},
        "a quarter decoded": {"decoder.share": 0.25},
    }


PLAIN = {"heads.blocks": [], "heads.scales": [], "heads.targets": [], "heads.weights": "equal", "decoder.share": 1.0}
PLAIN |= {f"teacher.{name}": value for name, value in asdict(TeacherConfig()).items()}


def bench_methods(wanted: Wanted) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step of every method over those of the first, a number a round: live, and cached at the last cut."""
    last = len(wanted.segments) - 1
    names = methods(wanted.identity["depth"])
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for where, stage in (("live", 0), ("cached", last))[: 2 if last else 1]:
        runners = method_runners(wanted, stage)
        times: dict[str, list[float]] = {name: [] for name in runners}
        for number in range(ROUNDS):
            for name in runners if number % 2 == 0 else reversed(runners):
                times[name].append(runners[name]())
        first = times[next(iter(names))]
        for name, seconds in times.items():
            found[name][where] = [mine / base for mine, base in zip(seconds, first, strict=True)]
    rows = table("method: seconds of a step over those of the first", "live", "cached, last cut")
    for name, by_place in found.items():
        rows.add_row(name, *(spread(by_place[where]) if where in by_place else "-" for where in ("live", "cached")))
    console().print(rows)
    return found


def method_runners(wanted: Wanted, stage: int) -> dict[str, Callable[[], float]]:
    """By method a function that times a step; methods that this model or stage cannot have are left out."""
    found = {}
    for name, settings in methods(wanted.identity["depth"]).items():
        config = parse(PLAIN | {"target.kind": "pixels"} | settings, wanted.config)
        try:
            check(config)
        except ConfigError:
            continue
        if stage or settings not in LATER:
            found[name] = method_runner(Wanted(config, wanted.paths), stage)
    return found


LATER = ({"target.kind": "features"}, {"target.kind": "teacher"})
"""Methods whose target is pixels before anything is frozen."""


def method_runner(wanted: Wanted, stage: int) -> Callable[[], float]:
    """A function that gives the median seconds of a few steps on inputs in memory."""
    segment = wanted.segments[stage]
    model, optimizer = fresh_model(wanted, stage, segment.cut, cached=stage > 0)
    source = step_source(wanted, stage, segment, model)
    inputs, train = source.load(segment, 0), wanted.config.train
    return lambda: seconds_of(lambda: train_step(model, optimizer, source, inputs, train), train)

