"""`permafrost bench`: what a training step costs in each arm, at each cut, measured side by side; what is quoted is
medians of ratios within a round, with their spread."""

from __future__ import annotations

import json
import statistics

from cache.manifest import atomic_write
from pipeline.desk import at_work
from pipeline.job import Job
from pipeline.rates import flop_bound, ratios, stage_rates
from pipeline.runner import ensure_cache
from pipeline.show import console, table


def run_bench(job: Job) -> None:
    """Six rounds of every arm's step at every cut; prints medians and spread, writes bench.json."""
    with at_work(job) as desk:
        for stage in range(1, len(desk.wanted.segments)):
            ensure_cache(desk, stage)
        rows = table("cut", "e2e", "freeze", "cached", "in memory", "cached / e2e", "FLOP bound", "cached / in memory")
        found = []
        for stage in range(1, len(desk.wanted.segments)):
            rates = stage_rates(desk.wanted, stage, seconds=2.0, rounds=6)
            bound = flop_bound(desk.wanted, stage)
            rows.add_row(
                str(desk.wanted.segments[stage].cut),
                *(f"{statistics.median(rates[arm]):.0f}" for arm in rates),
                spread(ratios(rates, "cached", "e2e")),
                f"{bound:.2f}",
                spread(ratios(rates, "cached", "memory")),
            )
            found.append({"cut": desk.wanted.segments[stage].cut, "flop_bound": bound, "images_per_second": rates})
        console().print(rows)
        atomic_write(job.paths.root / "bench.json", (json.dumps(found, indent=2) + "\n").encode())


def spread(values: list[float]) -> str:
    """`median (least-largest)`."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"
