"""What building caches has cost a run so far, kept beside the stage that is the first to read them. Free of torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cache.manifest import atomic_write
from cache.users import Cost, read_cost, sum_measured
from models.spec import FeatureSpec
from pipeline.decide import Wanted, new_needs
from pipeline.inputs import inputs_digest
from pipeline.layout import StagePaths


def read_seconds(paths: StagePaths, fingerprint: str) -> float:
    """What a cache has cost to build so far, in seconds, over all interruptions."""
    return spent_seconds(paths).get(fingerprint, 0.0)


def write_seconds(paths: StagePaths, fingerprint: str, seconds: float) -> None:
    paths.root.mkdir(parents=True, exist_ok=True)
    atomic_write(paths.root / "cache.json", json.dumps(spent_seconds(paths) | {fingerprint: seconds}).encode())


def spent_seconds(paths: StagePaths) -> dict[str, float]:
    """Seconds by fingerprint of every cache that was built for a stage."""
    file = paths.root / "cache.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}


@dataclass(frozen=True)
class Spent:
    """What a cache has cost a run, and others, in seconds."""

    own: float
    elsewhere: float | None
    """By other runs, or on rows that were taken over; None where that is not known."""
    crowded: float | None
    """Of all of them, what other work on the machine took, as far as it was measured; None where it was not."""


def spent_on(wanted: Wanted, paths: StagePaths, spec: FeatureSpec) -> Spent:
    """What a cache has cost that was built, or found, for what lies in `paths`."""
    own = read_seconds(paths, spec.fingerprint)
    cost = read_cost(wanted.cache_folder(spec)) or _kept_costs(paths).get(spec.fingerprint)
    return Spent(own, rest_of(cost, own), cost.crowded if cost else None)


def keep_cost(wanted: Wanted, paths: StagePaths, spec: FeatureSpec) -> None:
    """Note beside what reads a cache what that has cost: its own note goes with it, when a ring of views turns."""
    if cost := read_cost(wanted.cache_folder(spec)):
        kept = {name: asdict(one) for name, one in (_kept_costs(paths) | {spec.fingerprint: cost}).items()}
        atomic_write(paths.root / "costs.json", json.dumps(kept).encode())


def _kept_costs(paths: StagePaths) -> dict[str, Cost]:
    """By fingerprint."""
    file = paths.root / "costs.json"
    return {name: Cost(**cost) for name, cost in json.loads(file.read_text()).items()} if file.exists() else {}


def costs_of(spent: Iterable[Spent]) -> dict[str, float | None]:
    """The fields of a record."""
    found = list(spent)
    return {
        "cache_seconds": sum((one.own for one in found), 0.0),
        "cache_seconds_elsewhere": sum_known(one.elsewhere for one in found),
        "cache_crowded_seconds": sum_measured(one.crowded for one in found),
    }


def cache_costs(wanted: Wanted, stage: int) -> dict[str, Any]:
    """What the caches have cost that a stage is the first to read, by the fields of its record. Of a ring of views,
    `turns` says which of them were spent when."""
    paths = wanted.paths.stage(stage)
    turns, ahead = wanted.turns(stage), wanted.config.cache.refresh_ahead
    needs = [*new_needs(wanted, stage), *(wanted.features(stage, before) for before in range(turns))]
    if wanted.refresh(stage):  # and what was made ahead for a stage that ended early
        later = [wanted.features(stage, turn) for turn in range(turns + 1, turns + ahead + 1)]
        known = spent_seconds(paths)
        needs += [need for need in later if (spec := wanted.spec(need)) and spec.fingerprint in known]
    found = {}
    for spec in map(wanted.spec, needs if stage else ()):
        assert spec is not None, "they were built or found"
        found[spec.fingerprint] = spent_on(wanted, paths, spec)
    told: dict[str, Any] = costs_of(found.values())
    if wanted.refresh(stage):
        told |= {"refresh_wait_seconds": waited_seconds(wanted, stage), "turns": turn_costs(wanted, stage, found)}
    return told


def turn_costs(
    wanted: Wanted, stage: int, found: Mapping[str, Spent]
) -> list[dict[str, float]]:
    """What every turn of a stage's ring has cost, and before which epoch it was: of the run, as curves count, and of
    the stage. found: by fingerprint."""
    told, starts = [], wanted.starts(wanted.asked(stage), stage)
    for turn, epoch in starts.items():
        spec = wanted.spec(wanted.features(stage, turn))
        if turn and spec and spec.fingerprint in found:
            spent = found[spec.fingerprint]
            seconds = spent.own + (spent.elsewhere or 0.0)
            told.append({"epoch": epoch, "after": epoch - starts[0], "seconds": seconds})
    return told


def rest_of(total: Cost | None, own: float) -> float | None:
    """What a cache has cost beside a run's own seconds; None where that is not known: nobody noted what it has cost,
    and the run did not build it, or a part is noted as unknown."""
    if total is None:
        return 0.0 if own else None
    return None if math.isnan(total.seconds) else max(0.0, total.seconds - own)


def waited_seconds(wanted: Wanted, stage: int) -> float:
    """How long a stage has stood still at the turns of its ring of views: for what was made ahead and not finished, or,
    where nothing is made ahead, while the view was made."""
    try:
        found = json.loads(wanted.paths.stage(stage).ring.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return 0.0
    asked = inputs_digest(wanted.stage_inputs(stage))
    return float(found.get("waited", 0.0)) if found["of"] == asked else 0.0


def sum_known(seconds: Iterable[float | None]) -> float | None:
    """The sum; None where a part is unknown."""
    known = list(seconds)
    return None if None in known else sum((part for part in known if part is not None), 0.0)
