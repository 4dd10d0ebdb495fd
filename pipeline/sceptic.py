"""The sceptic's controls over seeds: runs in one folder that are alike but for their seed, put together in the `seeds`
of speedup.json: scores of every arm by seed, their curves' mean, and the cached arm less end to end, whole and stopped
early, with intervals. Stands between the comparisons of single runs and the report. Free of torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cache.manifest import atomic_write
from pipeline.claims import FEWEST_SEEDS, PROBES, aligned, interval, paired, times_unlike
from pipeline.comparable import scored_unlike, stopped_unfairly
from pipeline.layout import RunPaths
from pipeline.story import read_json, same_but_seed

Record = dict[str, Any]
CONTROLS = {"early_stop": lambda one: one["early_stop"], "e2e": lambda one: one["arms"]["e2e"]}
"""What the cached arm is compared with, and where a comparison has its scores."""


def refresh(paths: RunPaths) -> Record:
    """Bring the `seeds` of a run's speedup.json up to date with the runs beside it; the comparison as it then is."""
    found = read_json(paths.speedup)
    told = found | {"seeds": over_seeds(same_but_seed(paths))}
    if told != found:
        atomic_write(paths.speedup, (json.dumps(told, indent=2) + "\n").encode())
    return told


def over_seeds(found: Mapping[int, Record]) -> Record:
    """What comparisons that differ in their seed only say together. Lists are in the order of `seeds`; `half` is half
    of a 95 % interval by Student's t, None with one seed; `claimed` whether the interval carries a difference."""
    seeds = sorted(found)
    runs = [found[seed] for seed in seeds]
    arms = {
        arm: {key: [run["arms"][arm][key] for run in runs] for key in (*PROBES, "total_seconds")}
        | {"curve": mean_points([run["arms"][arm]["curve"] for run in runs])}
        for arm in (runs[0]["arms"] if runs else ())
    }
    stopped = {key: [run["early_stop"][key] for run in runs] for key in PROBES}
    return {
        "seeds": seeds,
        "interval": f"95 %, Student's t, of differences paired by seed; claimed from {FEWEST_SEEDS} seeds on",
        "arms": arms,
        "early_stop": stopped,
        "speedup_total": [run["speedup_total"] for run in runs],
        **{f"cached_less_{control}": differences(found, control) for control in CONTROLS},
    }


def differences(found: Mapping[int, Record], control: str) -> Record:
    """By probe, the cached arm less a control: by seed, their mean, its interval, one binomial standard error of a
    score on the evaluation images, and whether a difference is claimed; empty for images without labels, and where
    arms were scored differently or, of stopping early, their seconds do not compare."""
    told: Record = {}
    runs = list(found.values())
    early = control == "early_stop"
    unlike = scored_unlike(runs) or (times_unlike(runs) if early else "")
    unfair = stopped_unfairly(runs) if early else ""
    for key in PROBES if not unlike else ():
        ours = {seed: run["arms"]["cached"][key] for seed, run in sorted(found.items())}
        theirs = {seed: CONTROLS[control](run)[key] for seed, run in sorted(found.items())}
        if None in (*ours.values(), *theirs.values()):
            continue
        images = min((run["arms"]["cached"]["curve"][-1]["probe_images"] for run in found.values()), default=0)
        if pair := paired(ours, theirs, images):
            by_seed = [ours[seed] - theirs[seed] for seed in ours]
            claimed, said = pair.claimed(unfair)
            told[key] = {"differences": by_seed} | asdict(pair) | {"claimed": claimed, "said": said}
    return told


def mean_points(curves: Sequence[Sequence[Mapping[str, Any]]]) -> list[Record]:
    """The epochs that all curves have: mean seconds, and by probe the mean and half of its interval."""
    told = []
    for points in aligned(curves):
        point: Record = {key: statistics.fmean(one[key] for one in points) for key in ("seconds", "epoch")}
        for key in PROBES:
            scores = [one[key] for one in points]
            mean, half = spread_of(scores)
            point |= {key: mean, f"{key}_half": half}
        told.append(point)
    return told


def spread_of(scores: Sequence[float | None]) -> tuple[float | None, float | None]:
    """(mean, half of its 95 % interval); no interval of one seed, nothing where a score is missing."""
    known = [score for score in scores if score is not None]
    if len(known) < len(scores) or not known:
        return None, None
    return interval(known) if len(known) > 1 else (known[0], None)
