"""What a comparison of arms allows to say, and how surely: standard errors of scores, intervals over seeds, the first
line of the report. Pure functions of speedup.json; a difference within its error is never called one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROBES = {"knn_top1": "kNN", "linear_top1": "linear probe"}
Z95 = 1.96
FEWEST_SEEDS = 3
"""Runs with other seeds from which on intervals over seeds stand in for the error of one run's evaluation."""


@dataclass(frozen=True)
class Contrast:
    """How one score stands to another: their difference, and what it may be off by, 95 %."""

    name: str
    stopped: float
    cached: float
    error: float

    @property
    def difference(self) -> float:
        return self.cached - self.stopped

    @property
    def sure(self) -> bool:
        return abs(self.difference) > self.error

    def __str__(self) -> str:
        """`kNN 25.5 % against 25.8 % (within error, ±6.0 points)`."""
        how = "beyond" if self.sure else "within"
        return f"{self.name} {percent(self.stopped)} against {percent(self.cached)} ({how} error, {points(self.error)})"


def standard_error(score: float, images: int) -> float:
    """One standard error of the share of `images` that was right."""
    return math.sqrt(score * (1 - score) / images)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval by Student's t) of one value a seed; at least two."""
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(t.ppf(0.975, len(values) - 1)) * error


@dataclass(frozen=True)
class Paired:
    """The mean over seeds of one score less another of the same seed."""

    mean: float
    half: float | None
    """Half of its 95 % interval by Student's t; None with one seed."""
    seeds: int
    error: float
    """One binomial standard error of a score on the evaluation images, at the mean score of the two."""

    @property
    def sure(self) -> bool:
        """Whether a difference is claimed: enough seeds, and an interval without 0."""
        return self.seeds >= FEWEST_SEEDS and self.half is not None and abs(self.mean) > self.half

    @property
    def said(self) -> str:
        """`+1.2 points, 95 % interval +0.3 to +2.1 (3 seeds): higher`, or why no difference is claimed."""
        mean = f"{100 * self.mean:+.1f} points"
        if self.half is None or self.seeds < FEWEST_SEEDS:
            count = "one seed" if self.seeds == 1 else f"{self.seeds} seeds"
            return f"{mean}; {count}: no difference is claimed (one standard error of a score is {points(self.error)})"
        low, high = 100 * (self.mean - self.half), 100 * (self.mean + self.half)
        verdict = ("higher" if self.mean > 0 else "lower") if self.sure else "no difference within the interval"
        return f"{mean}, 95 % interval {low:+.1f} to {high:+.1f} ({self.seeds} seeds): {verdict}"


def paired(ours: Mapping[int, float], theirs: Mapping[int, float], images: int) -> Paired | None:
    """The paired difference of scores by seed, of the seeds that both have; None where there are none.

    images: how many images a score is the share of.
    """
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        return None
    differences = [ours[seed] - theirs[seed] for seed in both]
    mean, half = interval(differences) if len(both) > 1 else (differences[0], None)
    middle = statistics.fmean(score[seed] for seed in both for score in (ours, theirs))
    return Paired(mean, half, len(both), standard_error(middle, images) if images else math.nan)


def contrasts(found: dict[str, Any], seeds: Sequence[dict[str, Any]] = ()) -> list[Contrast]:
    """The cached arm beside e2e stopped at its total time, by probe; empty for images without labels.

    With enough seeds, means over them and the interval of the paired differences; else the error of two independent
    evaluations, which is somewhat too wide, since both arms are scored on the same images.
    """
    result = []
    for key, name in PROBES.items():
        pairs = [(one["early_stop"][key], one["arms"]["cached"][key]) for one in seeds or [found]]
        if any(score is None for pair in pairs for score in pair):
            continue
        if len(pairs) >= FEWEST_SEEDS:
            _, error = interval([cached - stopped for stopped, cached in pairs])
            stopped, cached = (statistics.fmean(side) for side in zip(*pairs, strict=True))
        else:
            stopped, cached = found["early_stop"][key], found["arms"]["cached"][key]
            images = found["arms"]["cached"]["curve"][-1]["probe_images"]
            error = Z95 * math.hypot(standard_error(stopped, images), standard_error(cached, images))
        result.append(Contrast(name, stopped, cached, error))
    return result


def headline(found: dict[str, Any], seeds: Sequence[dict[str, Any]] = ()) -> str:
    """The first line: the speed-up in total, and what stopping early says about it."""
    return f"{speedup_said(found, seeds)}{early_stop_said(contrasts(found, seeds), found)}"


def speedup_said(found: dict[str, Any], seeds: Sequence[dict[str, Any]] = ()) -> str:
    """`1.26× the speed of end to end, caches included`."""
    ratio, more = found["speedup_total"], ""
    if len(seeds) >= FEWEST_SEEDS:
        ratio, half = interval([one["speedup_total"] for one in seeds])
        more = f" (mean of {len(seeds)} seeds, 95 % interval {ratio - half:.2f} to {ratio + half:.2f})"
    return f"{'' if ratio >= 1 else 'Slower: '}{ratio:.2f}× the speed of end to end, caches included{more}"


def early_stop_said(found: Sequence[Contrast], comparison: dict[str, Any]) -> str:
    """What follows the speed-up in the first line. Cached training has won only where a probe is surely higher and none
    surely lower; where the two cannot be told apart, stopping early did as well."""
    seconds = comparison["arms"]["cached"]["total_seconds"]
    at = f"end to end stopped after the same {seconds:.1f} s"
    if comparison["arms"]["e2e"]["total_seconds"] <= seconds:
        at = "end to end, which was done before,"
    if not found:
        return "; the images have no labels, so nobody knows which arm learned more"
    higher = [one for one in found if one.sure and one.difference > 0]
    lower = [one for one in found if one.sure and one.difference < 0]
    if higher and not lower:
        names = " and ".join(one.name for one in higher)
        return f", and ahead of {at} in {names}"
    if all(one.difference <= 0 for one in found):
        return f" – but {at} scores as well or better"
    if lower:
        return f" – but {at} scores better in {' and '.join(one.name for one in lower)}"
    return f" – but {at} scores as well, within error"


def percent(score: float | None) -> str:
    """`25.8 %`; images without labels have no score."""
    return "–" if score is None else f"{100 * score:.1f}\N{NO-BREAK SPACE}%"


def points(difference: float) -> str:
    """`±6.0 points`."""
    return f"±{100 * difference:.1f} points"
