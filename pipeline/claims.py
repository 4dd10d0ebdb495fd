"""What a comparison of arms allows to say, and how surely: standard errors of scores, intervals over seeds, the first
line of the report. Pure functions of speedup.json; a difference within its error is never called one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.comparable import (
    crowded,
    epochs_unlike,
    scored_unlike,
    seconds_unlike,
    stopped_unfairly,
    trained_unlike,
)

PROBES = {"knn_top1": "kNN", "linear_top1": "linear probe"}
FEWEST_SEEDS = 3
"""Seeds from which on a difference may be claimed."""


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
            error = f"one standard error of a score is {points(self.error)}"
            return f"{mean}; {seeds_said(self.seeds)}: no difference is claimed ({error})"
        low, high = 100 * (self.mean - self.half), 100 * (self.mean + self.half)
        verdict = ("higher" if self.mean > 0 else "lower") if self.sure else "no difference within the interval"
        return f"{mean}, 95 % interval {low:+.1f} to {high:+.1f} ({self.seeds} seeds): {verdict}"

    def claimed(self, unfair: str) -> tuple[bool, str]:
        """(whether it is claimed, what is said). unfair: why the control may score worse than it could, if it may: that
        something scores above it is no claim then; that it scores below is one all the more."""
        if self.sure and self.mean > 0 and unfair:
            return False, f"{self.said}, but {unfair}: not claimed"
        return self.sure, self.said


@dataclass(frozen=True)
class Contrast:
    """How one score stands to another, in the mean over seeds."""

    name: str
    other: float
    cached: float
    paired: Paired
    """The cached arm less the other, seed by seed."""
    unfair: str = ""
    """Why the other may score worse than it could, if it may."""

    @property
    def difference(self) -> float:
        return self.paired.mean

    @property
    def sure(self) -> bool:
        return self.paired.sure

    def __str__(self) -> str:
        """`kNN 25.5 % against 25.8 %: +0.3 points; one seed: no difference is claimed (...)`."""
        _, said = self.paired.claimed(self.unfair)
        return f"{self.name} {percent(self.other)} against {percent(self.cached)}: {said}"


def standard_error(score: float, images: int) -> float:
    """One standard error of the share of `images` that was right."""
    return math.sqrt(score * (1 - score) / images)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval by Student's t) of one value a seed; at least two."""
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), float(t.ppf(0.975, len(values) - 1)) * error


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


def contrasts(
    found: dict[str, Any], seeds: Sequence[dict[str, Any]] = (), other: Literal["early_stop", "e2e"] = "early_stop"
) -> list[Contrast]:
    """The cached arm beside e2e, stopped at its total time or at its end, by probe; empty for images without labels,
    where the two were scored differently, and, of stopping early, where their seconds do not compare.

    seeds: comparisons of runs that differ in their seed only; differences are paired within each of them.
    """
    result: list[Contrast] = []
    if scored_unlike(seeds or [found]) or (other == "early_stop" and times_unlike(seeds or [found])):
        return result
    unfair = stopped_unfairly(seeds or [found]) if other == "early_stop" else ""
    for key, name in PROBES.items():
        pairs = [
            ((one["early_stop"] if other == "early_stop" else one["arms"]["e2e"])[key], one["arms"]["cached"][key])
            for one in seeds or [found]
        ]
        if any(score is None for pair in pairs for score in pair):
            continue
        theirs, ours = (dict(enumerate(side)) for side in zip(*pairs, strict=True))
        pair = paired(ours, theirs, found["arms"]["cached"]["curve"][-1]["probe_images"])
        assert pair, "there is one run at least"
        means = statistics.fmean(theirs.values()), statistics.fmean(ours.values())
        result.append(Contrast(name, *means, pair, unfair))
    return result


def headline(found: dict[str, Any], seeds: Sequence[dict[str, Any]] = ()) -> str:
    """The first line: the speed-up in total, and what stopping early says about it."""
    runs = seeds or [found]
    if unlike := scored_unlike(runs) or times_unlike(runs, brief=True) or lengths_unlike(runs):
        return f"{speedup_said(found, seeds)}; {unlike}"
    return f"{speedup_said(found, seeds)}{early_stop_said(contrasts(found, seeds), runs)}"


def lengths_unlike(runs: Sequence[dict[str, Any]]) -> str:
    """That end to end and cached training have trained for different numbers of epochs in some run; else empty."""
    arms = ({arm: one["arms"][arm] for arm in ("e2e", "cached")} for one in runs)
    return next((why for one in arms if (why := epochs_unlike(one))), "")


def times_unlike(runs: Sequence[dict[str, Any]], brief: bool = False) -> str:
    """Why seconds of end to end and of cached training do not compare in some run; empty where they do in all. brief:
    without how much of which arm other work has taken."""
    arms = [{arm: one["arms"][arm] for arm in ("e2e", "cached")} for one in runs]
    if brief and any(map(crowded, arms)) and not any(trained_unlike(one.values()) for one in arms):
        return "other work had the cores, so seconds do not compare"
    return next((why for one in arms if (why := seconds_unlike(one))), "")


def speedup_said(found: dict[str, Any], seeds: Sequence[dict[str, Any]] = ()) -> str:
    """`1.26× the speed of end to end, caches included`."""
    ratio, half, more = found["speedup_total"], 0.0, ""
    if len(seeds) >= FEWEST_SEEDS:
        ratio, half = interval([one["speedup_total"] for one in seeds])
        more = f" (mean of {len(seeds)} seeds, 95 % interval {ratio - half:.2f} to {ratio + half:.2f})"
    return f"{'Slower: ' if ratio + half < 1 else ''}{ratio:.2f}× the speed of end to end, caches included{more}"


def mean_seconds(runs: Sequence[dict[str, Any]], arm: str) -> float:
    """What an arm took in all, in the mean over comparisons."""
    return statistics.fmean(one["arms"][arm]["total_seconds"] for one in runs)


def early_stop_said(found: Sequence[Contrast], runs: Sequence[dict[str, Any]]) -> str:
    """What follows the speed-up in the first line. Cached training has won only where a probe is surely higher and none
    surely lower; where the two cannot be told apart, stopping early did as well. Too few seeds tell nothing apart."""
    seconds = mean_seconds(runs, "cached")
    at = f"end to end stopped after the same {seconds:.1f} s"
    if mean_seconds(runs, "e2e") <= seconds:
        at = "end to end, which was done before,"
    if not found:
        return "; the images have no labels, so nobody knows which arm learned more"
    higher = [one for one in found if one.sure and one.difference > 0]
    lower = [one for one in found if one.sure and one.difference < 0]
    if higher and not lower:
        names = " and ".join(one.name for one in higher)
        if seconds < mean_seconds(runs, "e2e") and (why := stopped_unfairly(runs)):
            return f"; above {at} in {names}, but {why}: it is not known how one planned that short would score"
        return f", and ahead of {at} in {names}"
    few = f", {seeds_said(found[0].paired.seeds)}" if found[0].paired.seeds < FEWEST_SEEDS else ""
    if all(one.difference <= 0 for one in found):
        return f" – but {at} scores as well or better{few}"
    if few:
        return f" – but beside {at}{few}: no difference is claimed"
    if lower:
        return f" – but {at} scores better in {' and '.join(one.name for one in lower)}"
    return f" – but {at} scores as well, within error"


def aligned(curves: Sequence[Sequence[Mapping[str, Any]]]) -> list[tuple[Mapping[str, Any], ...]]:
    """The points that curves of several seeds have at the same epochs, in the order of the first: stages that end by
    themselves end at other epochs with another seed."""
    by_epoch = [{point["epoch"]: point for point in curve} for curve in curves]
    shared = [epoch for epoch in (by_epoch[0] if by_epoch else ()) if all(epoch in points for points in by_epoch)]
    return [tuple(points[epoch] for points in by_epoch) for epoch in shared]


def seeds_said(count: int) -> str:
    """`one seed`, `2 seeds`."""
    return "one seed" if count == 1 else f"{count} seeds"


def percent(score: float | None) -> str:
    """`25.8 %`; images without labels have no score."""
    return "–" if score is None else f"{100 * score:.1f}\N{NO-BREAK SPACE}%"


def points(difference: float) -> str:
    """`±6.0 points`."""
    return f"±{100 * difference:.1f} points"
