"""The course of a run: its data, its stages with their segments, what the arms beside them train. It follows from the
settings alone, but for an adaptive run, whose stages end by themselves: there the records of finished stages tell it.
Stands between the settings and the verdicts of `decide`. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from cache.order import steps_per_epoch
from models.config import IMAGENET_MEAN, IMAGENET_STD, HeadSpec, head_specs, learning_heads, without
from models.identity import model_identity
from pipeline.config import ConfigError, PipelineConfig
from pipeline.layout import RunPaths, StagePaths
from stages.flops import Work
from stages.images import Data, by_class, open_data
from stages.schedule import StagePlan, plan_stages
from stages.segment import Segment, as_end_to_end, parts_of, segments_of, turned


@dataclass(frozen=True)
class Course:
    """A run as its settings ask for it. Stages are counted from 0."""

    config: PipelineConfig
    paths: RunPaths

    def record(self, paths: StagePaths) -> dict[str, Any] | None:
        """What stage.json says, or None where there is none."""
        try:
            found: dict[str, Any] = json.loads(paths.json.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        return found

    @cached_property
    def data(self) -> Data:
        return open_data(self.config.data, self.paths.index)

    @cached_property
    def scored(self) -> dict[str, Any]:
        """How encoders are scored while they are trained. No stage trains again for it, so every record says it."""
        asked, data = self.config.eval, self.data
        found = {f"eval.{name}": getattr(asked, name) for name in ("train_limit", "val_limit", "knn_k")}
        # Earlier versions took other rows where these are not simply spread; a record that says so is not like theirs.
        limits = ((data.train.labels, asked.train_limit), (data.val.labels, asked.val_limit))
        if any(by_class(labels[labels >= 0], limit) for labels, limit in limits):
            found["eval.rows"] = "in proportion to classes"
        return found | {"data.val": data.val.digest}

    @property
    def model_inputs(self) -> dict[str, Any]:
        """What an encoder's weights are shaped by, and what it computes with them, by the setting's name."""
        settings, usual = asdict(self.config.model), {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        named = {name: value for name, value in settings.items() if name not in ("attention", "weights")}
        return {f"model.{name}": value for name, value in named.items() if value != usual.get(name)}

    @cached_property
    def identity(self) -> dict[str, Any]:
        return model_identity(self.config.model)

    @cached_property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.data.train), self.config.train.batch_size)

    @cached_property
    def heads(self) -> tuple[HeadSpec, ...]:
        depth, blocks = self.identity["depth"], self.config.heads.blocks
        if blocks and blocks[-1] != depth:  # of a model of timm's name this is not known from the settings alone
            raise ConfigError(
                f"heads.blocks = {list(blocks)} must rise to {depth}, the last block of {self.config.model.name}: "
                "no block behind the last head learns"
            )
        return head_specs(self.config.heads, self.config.target, depth, self.config.teacher)

    def heads_of(self, stage: int) -> tuple[HeadSpec, ...]:
        """The heads of a stage and of arms from it on: a frozen teacher is there only once stage 0 has ended."""
        early = not stage and self.config.teacher.kind == "frozen"
        return without(self.heads, "teacher") if early else self.heads

    @property
    def first_target(self) -> dict[str, str]:
        """What stage 0 predicts, under the setting's name: no features are there yet, nor is a frozen teacher, whatever
        later stages predict. Nothing where heads are given, whose decoders are those of their later targets."""
        if self.config.heads.blocks:
            return {}
        (head,) = learning_heads(self.heads_of(0), cut=0)
        return {"target.kind": head.target}

    @property
    def adaptive(self) -> bool:
        """Whether stages end by themselves, so that the plan grows while the run does."""
        return self.config.schedule.kind == "adaptive"

    @property
    def why_nothing_freezes(self) -> str:
        """Why a run of one stage is one, for people."""
        if self.adaptive:
            return f"nothing settled in the {sum(self.config.schedule.epochs)} epochs of the run, and nothing froze"
        if self.config.schedule.caches == "cost":
            return "no freeze event deserves a cache (schedule.caches=cost), so that blocks freeze in place"
        return f"schedule.cuts={list(self.config.schedule.cuts)} freezes nothing"

    @property
    def plan(self) -> tuple[StagePlan, ...]:
        """The stages; of an adaptive run those that are finished and the open one after them."""
        return self._plan_after(len(self.config.schedule.cuts)) if self.adaptive else self._plan

    @cached_property
    def _plan(self) -> tuple[StagePlan, ...]:
        return self._plan_after(0)

    def _plan_after(self, stages: int) -> tuple[StagePlan, ...]:
        """The plan as it is known once the first so many stages are finished."""
        schedule, warmup = self.config.schedule, self.config.train.warmup_epochs
        work = self.work if schedule.caches == "cost" else None
        taken = self.taken[:stages] if self.adaptive else ()
        return plan_stages(schedule, self.identity["depth"], self.steps_per_epoch, warmup, work, taken)

    def refuse_targets_of_later_stages(self) -> None:
        """ConfigError where a head predicts what is only there behind a cache, or once stage 0 has ended, and by
        `schedule.caches=cost` there is no other stage. Not asked of what only reads what is there."""
        if self.config.schedule.caches != "cost" or len(self.plan) > 1:
            return
        frozen = self.config.teacher.kind == "frozen"
        late = {"features", "teacher"} if frozen else {"features"}
        if asked := [head.target for head in self.heads if head.target in late]:
            raise ConfigError(
                f"schedule.caches = cost finds no freeze event worth a cache, so there is one stage only, which cannot "
                f"predict {asked[0]}; use schedule.caches=given, or another target"
            )

    @property
    def taken(self) -> tuple[int, ...]:
        """Epochs that the finished stages took, as their records say."""
        found: list[int] = []
        for stage in range(len(self.config.schedule.cuts)):
            record = self.record(self.paths.stage(stage))
            if record is None or record["status"] != "done":
                break
            found.append(round(record["epochs"]))
        return tuple(found)

    @property
    def decided(self) -> bool:
        """Whether no stage is open any more."""
        return not self.adaptive or len(self.plan) == len(self.taken[: len(self.plan)])

    def why_no_stage(self, stage: int) -> str:
        """Why an adaptive run has no stage of a number: nothing is left for it, or nobody knows yet."""
        total, taken = sum(self.config.schedule.epochs), self.taken[:stage]
        if sum(taken) >= total:
            return f"the stages before it took all {total} epochs, schedule.epochs; raise that or schedule.settle_below"
        return f"open: it begins when stage {len(taken)} ends, if that leaves any of the {total} epochs"

    def used_up(self, stage: int) -> bool:
        """Whether the stages before a stage of an adaptive run took all epochs."""
        return self.adaptive and sum(self.taken[:stage]) >= sum(self.config.schedule.epochs)

    @property
    def candidates(self) -> int:
        """How many stages there may be; an adaptive run may end with fewer."""
        return len(self.config.schedule.cuts) if self.adaptive else len(self.plan)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The stages as one segment each, with the cut that they begin with."""
        return segments_of(self.plan, self.steps_per_epoch, self.config.train)

    def parts(self, stage: int) -> tuple[Segment, ...]:
        """What a stage trains: its segment, split where blocks freeze in place and where a ring of views turns."""
        return turned(parts_of(self.plan[stage], self.segments[stage]), self.refresh(stage))

    def refresh(self, stage: int) -> int:
        """Epochs after which a stage's oldest view is replaced; 0 where its views stay."""
        return self.config.cache.refresh if stage else 0

    def generation(self, segment: Segment, stage: int) -> int:
        """How often the ring of a stage has turned before a segment."""
        every = self.refresh(stage)
        return (segment.first_epoch - self.asked(stage)[0].first_epoch) // every if every else 0

    def starts(self, parts: Sequence[Segment], stage: int) -> dict[int, float]:
        """The epoch of the run at which each turn of a stage's ring of views is due; turn 0 is the stage's begin."""
        found: dict[int, float] = {}
        for part in parts:
            found.setdefault(self.generation(part, stage), part.trained(0))
        return found

    def views_beside(self, stage: int) -> int:
        """The most views that a stage's ring has on disk besides those that are read: the one that a turn makes, or
        those of `cache.refresh_ahead`. How often later stages of an adaptive run turn nobody knows."""
        asked, most = self.asked(stage), max(1, self.config.cache.refresh_ahead)
        if not self.refresh(stage):
            return 0
        return min(most, self.generation(asked[-1], stage)) if asked else most

    def asked(self, stage: int) -> tuple[Segment, ...]:
        """The parts of a stage as they are asked for before it begins; an adaptive one may take all that is left.

        Empty where an adaptive run has no such stage, or does not know yet.
        """
        plan = self._plan_after(stage) if self.adaptive else self.plan
        if stage >= len(plan):
            return ()
        whole = segments_of(plan, self.steps_per_epoch, self.config.train)[stage]
        return turned(parts_of(plan[stage], whole), self.refresh(stage))

    @property
    def total_steps(self) -> int:
        if self.adaptive:
            return sum(self.config.schedule.epochs) * self.steps_per_epoch
        return sum(segment.steps for segment in self.segments)

    @property
    def work(self) -> Work:
        """The sizes that decide what training and caches cost; a ratio that changes counts as half way through."""
        config, identity = self.config, self.identity
        tokens = config.model.num_tokens
        visible = int(tokens * (1 - config.mask.ratio_at(0.5)))
        return Work(
            depth=identity["depth"],
            width=identity["width"],
            tokens=tokens,
            visible=visible,
            groups=config.mask.groups,
            patch_values=config.model.patch_values,
            decoded=visible + round(config.decoder.share * (tokens - visible)),
            decoder_depth=config.decoder.depth,
            decoder_width=config.decoder.sizes(identity["width"])[0],
            samples=len(self.data.train),
            views=config.cache.views,
            images_per_epoch=self.steps_per_epoch * config.train.batch_size,
            averaged=config.teacher.kind == "ema" and any(head.teacher for head in self.heads),
        )

    def cut(self, stage: int) -> int:
        """A stage's cut; of an adaptive run also that of a candidate whose stage does not exist yet."""
        return self.config.schedule.cuts[stage] if self.adaptive else self.plan[stage].cut

    def raised_heads(self, stage: int) -> tuple[HeadSpec, ...]:
        """The heads whose block of a moving average is frozen: they predict the cut's features in its place."""
        cut = self.segments[stage].cut
        heads = learning_heads(self.heads, cut) if self.config.teacher.kind == "ema" else ()
        return tuple(head for head in heads if head.target == "teacher" and head.teacher < cut)

    def teacher_blocks(self, stage: int) -> tuple[int, ...]:
        """The blocks of a frozen teacher that a stage's heads predict, ascending."""
        if self.config.teacher.kind != "frozen":
            return ()
        return tuple(sorted({head.teacher for head in learning_heads(self.heads, self.cut(stage))} - {0}))

    def renewed(self, segment: Segment) -> int:
        """The stage at whose start the decoder of a segment began anew; 0: it is stage 0's, carried over. Where nothing
        is frozen, as in the e2e arm, no stage begins."""
        if self.config.decoder.carry or not segment.cut:
            return 0
        return max(stage for stage, begun in enumerate(self.segments) if begun.first_epoch <= segment.first_epoch)

    def arm_segments(self, arm: str) -> tuple[Segment, ...]:
        """What an arm trains after stage 0: e2e freezes nothing, freeze freezes exactly when the stages do."""
        if arm == "e2e":
            return as_end_to_end(self.segments[1:])
        return tuple(part for stage in range(1, len(self.plan)) for part in self.parts(stage))
