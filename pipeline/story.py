"""What the files of a run say, gathered for its report: records, comparison, events, manifests, settings. Only read, so
that a run at work is not disturbed, and taken as they are: half done, at work, or in parts of different age."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cache.errors import CacheError
from cache.manifest import CacheManifest, read_manifest
from cache.place import matching
from cache.users import users
from pipeline.config import ConfigError
from pipeline.decide import ARMS, Verdict, Wanted, judge_all
from pipeline.layout import RunPaths, run_paths
from pipeline.live import place
from pipeline.reading import read_toml
from pipeline.speedup import arm_summary
from pipeline.status import records as records_of

Record = dict[str, Any]


@dataclass(frozen=True)
class Cache:
    """A finished cache that a run reads."""

    folder: Path
    manifest: CacheManifest

    @property
    def bytes(self) -> int:
        """All its files but the manifest."""
        return sum(entry.bytes for entry in self.manifest.shards)

    @property
    def codec(self) -> str:
        """How its values are stored: `int8, blocks of 32, zstd`."""
        spec = self.manifest.spec
        parts = [spec.codec, f"blocks of {spec.block}" if spec.codec == "int8" else "", self.manifest.compression]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Story:
    """A run as its files tell it. Stages are in order; of records only those that are done are in `stages`, `arms` and
    `finetune`, and only as far as each goes on from the one before."""

    paths: RunPaths
    settings: dict[str, Any]
    """config.toml, section by section."""
    records: dict[str, Record]
    """Every record by name, `stage 0`, `arm e2e`, `finetune`, whatever its status."""
    stages: list[Record]
    arms: dict[str, Record]
    finetune: Record | None
    speedup: Record | None
    """The comparison, if it is of these very stages and arms."""
    outdated: bool
    """Whether there is one of earlier ones."""
    probe: Record
    """What `probe` found of the encoders that lie there, on the run's own images."""
    plan: Record
    steps: dict[str, list[Record]]
    """By place, such as `stage-0`, the events of its steps, without those that were trained again later."""
    caches: list[Cache]
    verdicts: list[Verdict]
    unknown: str = ""
    """Why there are no verdicts."""
    probe_unlike: list[str] = field(default_factory=list)
    """The encoders of which probe.json has other scores."""
    seeds: dict[int, Record] = field(default_factory=dict)
    """By seed, the comparisons of runs beside this one that differ from it in their seed only, and its own."""

    @property
    def runs(self) -> list[Record]:
        """The comparisons over seeds, by seed."""
        return [self.seeds[seed] for seed in sorted(self.seeds)]

    @property
    def courses(self) -> dict[str, list[Record]]:
        """The records that each arm consists of, in order, as far as they are done; an arm of nothing is left out."""
        if not self.stages:
            return {}
        found = {name: [self.stages[0], self.arms[name]] for name in ARMS if name in self.arms}
        return found | {"cached": self.stages}

    @property
    def summaries(self) -> dict[str, Record]:
        """Every arm as the comparison has it, or, where there is none yet, as its records add up to so far."""
        if self.speedup:
            return {name: self.speedup["arms"][name] for name in (*ARMS, "cached")}
        return {name: arm_summary(parts) for name, parts in self.courses.items()}

    @property
    def machine(self) -> Record:
        """The machine of the newest part that says so."""
        told = [record["machine"] for record in self.records.values() if "machine" in record]
        keys = ("device", "precision", "threads", "versions")
        return {key: self.speedup[key] for key in keys} if self.speedup else told[-1] if told else {}


def read_story(paths: RunPaths) -> Story:
    """The story of the run in a folder. Raises ConfigError where there is none."""
    root = read_settings(paths).get("cache", {}).get("root")
    paths = replace(run_paths(str(paths.root), root), lists=paths.lists) if root else paths
    records = dict(records_of(paths))
    if not records or not paths.config.exists():
        raise ConfigError(
            f"no run in {paths.root}; start one with `make all` or `make stage-0`, or name one with RUN="
        )
    stages, arms = finished(records)
    comparison = read_json(paths.speedup)
    current = compares(comparison, records)
    verdicts, unknown = standing(paths)
    tuned = records.get("finetune", {})
    probed = read_json(paths.probe)
    own = own_probes(probed, records)
    return Story(
        paths=paths,
        settings=read_settings(paths),
        records=records,
        stages=stages,
        arms=arms,
        finetune=tuned if tuned.get("status") == "done" else None,
        speedup=comparison if current else None,
        outdated=bool(comparison) and not current,
        probe=own,
        probe_unlike=[name for name in probed if name not in own],
        plan=read_json(paths.plan),
        steps=step_events(read_events(paths.events)),
        caches=list(read_caches(paths, records)),
        verdicts=verdicts,
        unknown=unknown,
        seeds=same_but_seed(paths) if current else {},
    )


def read_json(path: Path) -> Record:
    """The values of a file; none where it is missing or half written."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}


def finished(records: dict[str, Record]) -> tuple[list[Record], dict[str, Record]]:
    """The stages that are done, as far as each goes on from the one before it, and the arms that go on from stage 0."""
    stages: list[Record] = []
    while (record := records.get(f"stage {len(stages)}")) and record["status"] == "done":
        if stages and record["parent"] != stages[-1]["fingerprint"]:
            break
        stages.append(record)
    arms = {name: records[f"arm {name}"] for name in ARMS if f"arm {name}" in records}
    first = stages[0]["fingerprint"] if stages else ""
    return stages, {k: arm for k, arm in arms.items() if arm["status"] == "done" and arm["parent"] == first}


def compares(comparison: Record, records: dict[str, Record]) -> bool:
    """Whether a comparison is of the stages and arms as they lie there."""
    stages, arms = finished(records)
    states = [record["state"] for record in (*stages, *(arms[name] for name in ARMS if name in arms))]
    return bool(comparison) and comparison.get("of") == states


def own_probes(found: Record, records: dict[str, Record]) -> Record:
    """Of what `probe` found, the scores of the weights that records speak of, on the images of those records."""

    def own(name: str, scores: Record) -> bool:
        record, scored = records.get(name, {}), scores.get("scored", {})
        images = record.get("inputs", {}).get("data"), (record.get("scored") or {}).get("data.val")
        return scores["weights"] == record.get("weights") and images == (scored.get("data"), scored.get("data.val"))

    return {name: scores for name, scores in found.items() if own(name, scores)}


def standing(paths: RunPaths) -> tuple[list[Verdict], str]:
    """How every part of a run stands by its own settings, as `explain` says it; or why that cannot be said."""
    try:
        return judge_all(Wanted(read_toml(paths.config), paths)), ""
    except (ValueError, OSError) as error:  # its images, for instance, are not on this machine
        return [], " ".join(str(error).split())


def read_events(path: Path) -> Iterator[Record]:
    """The events of a log that may be growing, and may hold half a line of a process that was killed."""
    for line in path.read_bytes().splitlines() if path.exists() else ():
        with suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                yield event


def step_events(events: Iterator[Record]) -> dict[str, list[Record]]:
    """The events of training steps by place. Where training went on from an earlier step, what is later goes."""
    found: dict[str, list[Record]] = {}
    for event in events:
        if "step" in event and "loss" in event:
            steps = found.setdefault(place(event), [])
            while steps and steps[-1]["step"] >= event["step"]:
                steps.pop()
            steps.append(event)
    return found


def read_caches(paths: RunPaths, records: dict[str, Record]) -> Iterator[Cache]:
    """The finished caches that a run reads, by cut: those that its records name and those that it noted as its own."""
    named = {str(record["cache"]) for record in records.values() if record.get("cache")}
    noted: set[str] = set()
    there: list[Path] = []
    with suppress(CacheError, OSError):
        there = list(matching(paths.cache_root, "cut-*"))
        noted = {name for user in users(paths.cache_root) if user.is_run(paths.root) for name in user.caches}
    found = []
    for folder in there:
        with suppress(CacheError, OSError):
            manifest = read_manifest(folder)
            if manifest.fingerprint in named or folder.name in noted:
                found.append(Cache(folder, manifest))
    yield from sorted(found, key=lambda cache: (cache.manifest.spec.cut, cache.folder.name))


def same_but_seed(paths: RunPaths) -> dict[int, Record]:
    """By seed, the comparisons of the runs in the same folder whose settings differ in the seed only, its own too."""
    own = comparable(read_settings(paths))
    found: dict[int, Record] = {}
    others = [RunPaths(file.parent) for file in sorted(paths.root.absolute().parent.glob("*/config.toml"))]
    for run in (paths, *others):
        settings, comparison = read_settings(run), read_json(run.speedup)
        if settings and comparable(settings) == own and compares(comparison, dict(records_of(run))):
            found.setdefault(settings["seed"], comparison)
    return found


def read_settings(paths: RunPaths) -> Record:
    """The sections of a run's config.toml; none where it is no such file."""
    try:
        return tomllib.loads(paths.config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def comparable(settings: Record) -> Record:
    """Settings without the seed and where the caches lie."""
    cache = {key: value for key, value in settings.get("cache", {}).items() if key != "root"}
    return {key: value for key, value in settings.items() if key != "seed"} | {"cache": cache}
