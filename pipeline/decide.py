"""What a run wants, what it has, and therefore what is current, stale or missing. `stage` acts on these verdicts and
`explain` prints them. Free of torch, so that a call with nothing to do returns at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from cache.errors import CacheError, MissingCache
from cache.layout import Layout
from cache.manifest import cache_folder_name, check_spec, read_manifest
from cache.place import is_there, matching
from models.config import IMAGE_TARGETS, learning_heads
from models.spec import COMPUTATION_VERSION, FeatureSpec
from pipeline.budget import cached_stages
from pipeline.course import Course
from pipeline.inputs import difference, inputs_digest, named
from pipeline.kept import going_on, lost_epochs, never_reached
from pipeline.layout import StagePaths
from pipeline.needs import Need
from pipeline.tuned import Tuning, last_tuning
from stages.segment import Segment
from stages.views import view_transform_id
from stages.weights import weights_digest

TRAINING_VERSION = 1
"""Bumped when training computes other numbers for a reason that no setting tells."""

ARMS = ("e2e", "freeze")

NO_INFLUENCE = frozenset(
    {
        *("train.device", "train.threads", "train.loader_threads", "train.prefetch", "train.save_every"),
        *("train.compile", "train.parallel", "train.max_steps", "train.save_epochs"),
    }
)
"""Settings of `train` that change how fast a stage is, act through its number of steps, or only keep what passes by."""

State = Literal["current", "stale", "missing", "unfinished"]


@dataclass(frozen=True)
class Verdict:
    """How something that the run wants stands, and why."""

    what: str
    state: State
    reason: str
    scored: str = ""
    """How a part that is current was scored otherwise than the settings ask: it is not trained again for that."""

    @property
    def current(self) -> bool:
        return self.state == "current"

    @property
    def told(self) -> str:
        """The reason, and how it was scored."""
        return self.reason + (f"; scored otherwise than asked: {self.scored}" if self.scored else "")


@dataclass(frozen=True)
class Wanted(Course):
    """The run as its settings ask for it, and what every part of it depends on."""

    @cached_property
    def weights(self) -> str:
        """sha256 of the checkpoint file to start from: its content, wherever it lies."""
        return weights_digest(self.config.model.weights, self.paths.index / "weights.json")

    def stage_inputs(self, stage: int) -> dict[str, Any]:
        """Everything that can change the outcome of a stage, by the setting's name."""
        inputs = self._common() | self._taught(stage) | self.config.decoder.inputs(later=stage > 0)
        inputs |= {"schedule.stage": [asdict(part) for part in self.asked(stage)]}
        inputs |= {} if stage else self.first_target
        inputs |= self._adaptive_inputs(stage) if self.adaptive else {}
        if stage:
            parent = self.record(self.paths.stage(stage - 1)) or {}
            cache = self.config.cache
            inputs |= {"cache.views": cache.views} | ({"cache.refresh": cache.refresh} if cache.refresh else {})
            inputs |= cache.inputs(stage > 1) if stage in self.cached_stages else {}
            inputs |= {"mask.groups": self.config.mask.groups, "parent state": parent.get("state")}
            if live := [one for one in range(1, stage + 1) if one not in self.cached_stages]:
                inputs |= {"cache.live_stages": live}
        return inputs

    def arm_inputs(self, arm: str) -> dict[str, Any]:
        """The same for a baseline arm, which goes on from stage 0."""
        segments = self.arm_segments(arm)
        inputs = self._common(arm) | self._taught(1) | {"arm": arm} | self.config.decoder.inputs(arm == "freeze")
        inputs |= {"schedule.stages": [asdict(segment) for segment in segments]}
        if arm == "freeze" and any(self.reads_features(segment) for segment in segments):
            inputs |= {"mask.groups": self.config.mask.groups}
        return inputs | {"parent state": (self.record(self.paths.stage(0)) or {}).get("state")}

    def reads_features(self, segment: Segment) -> bool:
        """Whether a head predicts features of the segment's cut, which exist only as a cache holds them."""
        return any(head.target == "features" for head in learning_heads(self.heads, segment.cut, segment.entry))

    def _adaptive_inputs(self, stage: int) -> dict[str, Any]:
        """What decides when an adaptive stage ends; the last has nothing to decide."""
        schedule = self.config.schedule
        names = ("check_every", "probe_images", "settle_metric", "settle_below", "settle_checks")
        if stage + 1 >= len(schedule.cuts):
            return {}
        return {"schedule.next_cut": schedule.cuts[stage + 1]} | {
            f"schedule.{name}": getattr(schedule, name) for name in names
        }

    def _taught(self, stage: int) -> dict[str, Any]:
        """What a stage's teacher depends on; nothing where no head has one."""
        if not any(head.teacher for head in self.heads_of(stage)):
            return {}
        if self.config.teacher.kind == "ema":
            return named("teacher", self.config.teacher)
        record = self.record(self.paths.stage(0)) or {}
        weights = record.get("frozen_weights", {}).get(str(self.identity["depth"]))
        return named("teacher", self.config.teacher, {"momentum"}) | {"teacher weights": weights}

    def _common(self, arm: str = "") -> dict[str, Any]:
        config, train = self.config, self.config.train
        inputs: dict[str, Any] = {"seed": config.seed, "data": self.data.train.digest, "version": TRAINING_VERSION}
        inputs |= {"data.views": view_transform_id(config.data, config.model.image_size)} | config.cache.order_inputs
        inputs |= self.model_inputs | named("mask", config.mask, {"groups"})
        inputs |= {"model.weights": self.weights} if config.model.weights else {}
        inputs |= named("target", config.target) | config.decoder.inputs() | named("heads", config.heads)
        unused = set() if train.lr_schedule == "wsd" else {"decay_share"}
        inputs |= named("train", train, {name.removeprefix("train.") for name in NO_INFLUENCE} | unused)
        by_layer = config.schedule.kind == "freezeout" and arm != "e2e"
        by_progress = config.mask.changes or ":" in config.heads.weights or train.layer_drop > 0
        if by_layer or by_progress or (train.lr_schedule in ("cosine", "wsd") and not train.lr_restart):
            inputs |= {"schedule.total_steps": self.total_steps}
        if by_layer:
            names = ("kind", "t0", "scale", "scale_lr", "layer_rates", "freeze_embed")
            inputs |= {f"schedule.{name}": getattr(config.schedule, name) for name in names}
        if train.early_stop:
            told = ("every", "train_limit", "val_limit", "knn_k")
            inputs |= {f"eval.{name}": getattr(config.eval, name) for name in told}
            inputs |= {"data.val": self.data.val.digest}
        return inputs

    def needs(self, stage: int) -> tuple[Need, ...]:
        """The caches that a stage reads: the features that it learns from, then those of its teacher; none where it
        runs its frozen blocks live."""
        return (self.features(stage), *self.teachers(stage)) if stage in self.cached_stages else ()

    @cached_property
    def cached_stages(self) -> tuple[int, ...]:
        """The stages that learn from caches, ascending."""
        return cached_stages(self)

    def features(self, stage: int, generation: int | None = None) -> Need:
        """The cache of what a stage learns from; it continues the nearest earlier one, whose views are the same.

        generation: how often its ring of views has turned, by now if None. What the stage before had is then gone.
        """
        draft = self.draft_spec(stage)
        if self.refresh(stage):
            turns = self.turns(stage) if generation is None else generation
            return Need(f"cache {stage}", stage - 1, replace(draft, first_view=turns))
        earlier = [one for one in self.cached_stages if one < stage]
        parent = self.features(earlier[-1]) if earlier else None
        return Need(f"cache {stage}", stage - 1, draft, parent)

    def turns(self, stage: int) -> int:
        """How often a stage's ring of views has turned by now: noted beside the stage, for what it is asked to do."""
        try:
            found: dict[str, Any] = json.loads(self.paths.stage(stage).ring.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return 0
        return int(found["turns"]) if found["of"] == inputs_digest(self.stage_inputs(stage)) else 0

    def teachers(self, stage: int) -> tuple[Need, ...]:
        """The caches of the frozen teacher's blocks that a stage's heads predict, each continuing the one before.

        All tokens of a view run together, unmasked. Later stages read some of those that the first reads.
        """
        found: list[Need] = []
        for draft in self.teacher_drafts(first := self.cached_stages[0]):
            parent = found[-1] if found else None
            found.append(Need(f"cache teacher-{draft.cut}", 0, draft, parent, reader=first))
        return tuple(need for need in found if need.draft.cut in self.teacher_blocks(stage))

    def teacher_drafts(self, stage: int) -> list[FeatureSpec]:
        """What is known before training of the caches of a stage's frozen teacher, by block."""
        plain = replace(self.draft_spec(1), groups=1, mask_ratio=0.0, mask_block=1, pixels=False)
        return [replace(plain, cut=block) for block in self.teacher_blocks(stage)]

    def spec(self, need: Need) -> FeatureSpec | None:
        """The whole identity of a cache; None as long as the stage that its weights come from has not been trained."""
        parent = self.spec(need.parent) if need.parent else None
        record = self.record(self.paths.encoder(need.maker)) or {}
        weights = record.get("frozen_weights", {}).get(str(need.draft.cut))
        if not weights or (need.parent and parent is None):
            return None
        return replace(need.draft, weights=weights, parent=parent.fingerprint if parent else "")

    def cache_spec(self, stage: int) -> FeatureSpec | None:
        """The identity of the features that a stage reads; None as long as the stage before it has not been trained."""
        return self.spec(self.features(stage))

    def draft_spec(self, stage: int) -> FeatureSpec:
        """The cache's identity as far as it is known before anything is trained: weights and parent are open."""
        config = self.config
        return FeatureSpec(
            **self.identity,
            image_size=config.model.image_size,
            patch_size=config.model.patch_size,
            weights="",
            cut=self.cut(stage),
            groups=config.mask.groups,
            mask_ratio=config.mask.ratio,
            mask_block=config.mask.block if config.mask.groups > 1 else 1,
            views=config.cache.views,
            view_transform=view_transform_id(config.data, config.model.image_size),
            data=self.data.train.digest,
            seed=config.seed,
            dtype=config.train.precision,
            **config.cache.stored(later=stage > 1),
            pixels=config.cache.pixels == "stored" and any(head.target in IMAGE_TARGETS for head in self.heads),
            parent="",
            version=COMPUTATION_VERSION,
        )

    def layout(self, need: Need) -> Layout:
        """How a cache lies on disk, known before it is built."""
        return need.layout(len(self.data.train), self.config.cache)

    def cache_folder(self, spec: FeatureSpec) -> Path:
        return self.paths.cache_root / cache_folder_name(spec)


def judge_stage(wanted: Wanted, stage: int) -> Verdict:
    """Whether a stage is current, given that the stages before it are."""
    what, paths, segments = f"stage {stage}", wanted.paths.stage(stage), wanted.asked(stage)
    if not segments:
        return Verdict(what, "missing", wanted.why_no_stage(stage))
    return _judge(wanted, what, paths, wanted.stage_inputs(stage), segments)


def judge_arm(wanted: Wanted, arm: str) -> Verdict:
    """Whether a baseline arm is current, given that stage 0 is. It follows the plan, so that must be decided."""
    if not wanted.decided:
        return Verdict(f"arm {arm}", "missing", f"open: it follows the plan, and stage {len(wanted.taken)} is not done")
    return _judge(wanted, f"arm {arm}", wanted.paths.arm(arm), wanted.arm_inputs(arm), wanted.arm_segments(arm))


def judge_finetune(tuning: Tuning) -> Verdict:
    """Whether fine-tuning is current, given that the encoder that it starts from is."""
    wanted = tuning.wanted
    return _judge(wanted, "finetune", wanted.paths.finetune, tuning.inputs(), ())


def judge_cache(wanted: Wanted, need: Need) -> Verdict:
    """Whether a cache is on disk, complete and the very one that is wanted."""
    name, spec = need.name, wanted.spec(need)
    if spec is None:
        return Verdict(name, "missing", f"{need.maker} has to be trained first")
    folder = wanted.cache_folder(spec)
    try:
        check_spec(read_manifest(folder), spec)
    except MissingCache:
        state: State = "unfinished" if is_there(folder) else "missing"
        other = _nearest_cache(wanted, spec)
        return Verdict(
            name, "stale" if other and state == "missing" else state, other or f"no complete cache in {folder}"
        )
    except CacheError as error:
        return Verdict(name, "stale", str(error))
    return Verdict(name, "current", str(folder))


def judge_all(wanted: Wanted) -> list[Verdict]:
    """Every stage, cache and arm in the order in which they would run.

    Whatever follows a stage that will run again is stale; a cache is not needed for a stage that is current.
    """
    stages: list[Verdict] = []
    broken: list[str] = []  # of every stage: the first before it, or itself, that will run again
    for stage in range(wanted.candidates):
        if wanted.used_up(stage):
            break
        stages.append(_after(broken[-1] if broken else "", judge_stage(wanted, stage)))
        broken.append((broken[-1] if broken else "") or ("" if stages[-1].current else stages[-1].what))
    found: list[Verdict] = []
    for stage, verdict in enumerate(stages):
        for need in new_needs(wanted, stage) if wanted.asked(stage) else ():
            readers = [later for later in range(stage, len(stages)) if need in wanted.needs(later)]
            used = [reader for reader in readers if not stages[reader].current]
            found.append(_cache_verdict(_after(broken[need.after], judge_cache(wanted, need)), stage, bool(used)))
        found.append(verdict)
    arms = ARMS if len(wanted.segments) > 1 or not wanted.decided else ()
    found += [_after(broken[0], judge_arm(wanted, arm)) for arm in arms]
    return found + _judge_tuned(wanted, found)


def _judge_tuned(wanted: Wanted, before: list[Verdict]) -> list[Verdict]:
    """The same of fine-tuning, where the run has been fine-tuned: the cache that it reads, and itself."""
    tuning = last_tuning(wanted)
    if tuning is None:
        return []
    state = {verdict.what: verdict for verdict in before}
    broken = "" if tuning.encoder in state and state[tuning.encoder].current else tuning.encoder
    verdict = _after(broken, judge_finetune(tuning))
    if tuning.need is None:
        return [verdict]
    cache = _after(broken, judge_cache(wanted, tuning.need))
    if verdict.current and not cache.current:
        cache = replace(cache, reason="not needed, finetune is current")
    return [cache, verdict]


def new_needs(wanted: Wanted, stage: int) -> tuple[Need, ...]:
    """The caches that a stage is the first to read; none for stage 0, which reads images."""
    return tuple(need for need in wanted.needs(stage) if need.stage == stage) if stage else ()


def all_needs(wanted: Wanted) -> list[Need]:
    """The caches that the stages and the fine-tuning of a run read, parents first."""
    tuning = last_tuning(wanted)
    tuned = [tuning.need] if tuning and tuning.need else []
    return [need for stage in range(1, len(wanted.segments)) for need in new_needs(wanted, stage)] + tuned


def _cache_verdict(verdict: Verdict, stage: int, needed: bool) -> Verdict:
    if verdict.current or needed:
        return verdict
    return replace(verdict, reason=f"not needed, stage {stage} is current")


def _after(broken: str, verdict: Verdict) -> Verdict:
    if broken and verdict.current:
        return Verdict(verdict.what, "stale", f"{broken} runs again before it")
    return verdict


def _judge(
    wanted: Wanted, what: str, paths: StagePaths, inputs: dict[str, Any], segments: tuple[Segment, ...]
) -> Verdict:
    record = wanted.record(paths)
    if record is None:
        return Verdict(what, "missing", f"no {paths.json}")
    plain = json.loads(json.dumps(inputs))
    if record.get("inputs") != plain:
        return Verdict(what, "stale", difference(record.get("inputs") or {}, plain))
    epochs = wanted.config.train.save_epochs
    if record["status"] != "done":
        return Verdict(what, "unfinished", going_on(epochs, segments, record, paths, what))
    for path, size in record["files"].items():
        file = paths.root / path
        if not file.exists() or file.stat().st_size != size:
            return Verdict(what, "missing", f"{file} is gone or has another size than {size} bytes")
    if segments and (lost := lost_epochs(epochs, segments, record, paths)):
        return Verdict(what, "stale", f"train.save_epochs wants {paths.epoch(lost[0])}, which was not kept")
    reason = f"fingerprint {record['fingerprint'][:8]}"
    if record.get("ended"):
        reason += f"; {record['ended']['why']}"
    if segments and (later := never_reached(epochs, segments, record)):
        reason += f"; ended before epoch {later[0]} of train.save_epochs"
    names = ("eval.val_limit", "data.val") if what == "finetune" else ()
    return Verdict(what, "current", reason, _scored_otherwise(wanted, record, names))


def _scored_otherwise(wanted: Wanted, record: Mapping[str, Any], names: tuple[str, ...]) -> str:
    """How a part was scored otherwise than the settings ask, of all or some that say how; empty where nobody noted."""
    noted = record.get("scored") or {}
    if noted and "eval.rows" in wanted.scored:  # of which an earlier version, which took others, noted nothing
        noted = {"eval.rows": "evenly spread"} | noted
    had = {name: value for name, value in noted.items() if name in (names or wanted.scored)}
    return difference(had, {name: value for name, value in wanted.scored.items() if name in had})


def _nearest_cache(wanted: Wanted, spec: FeatureSpec) -> str | None:
    """Why the caches of the same cut that lie there will not do: the one that differs least speaks for all.

    One that the run wants as it is, is no older state of this one.
    """
    others = {wanted.cache_folder(other) for need in all_needs(wanted) if (other := wanted.spec(need))}
    found = []
    for folder in set(matching(wanted.paths.cache_root, f"cut-{spec.cut}-*")) - others:
        with suppress(CacheError):
            found.append(read_manifest(folder))
    if not found:
        return None
    try:
        check_spec(min(found, key=lambda manifest: len(spec.differences(manifest.spec))), spec)
    except CacheError as error:
        return str(error)
    return None
