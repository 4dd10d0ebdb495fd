"""The work that the runner has decided on: train a stage or a baseline arm, and write down what came of it. A record
says `done` only after everything it names is on disk."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from cache.manifest import atomic_write
from models.drop import DepthDrop
from models.learner import Learner
from models.mim import MaskedModel
from models.teacher import EmaTeacher, Teacher
from models.vit import Encoder, frozen_hash
from pipeline.comparable import so_far
from pipeline.config import PipelineConfig
from pipeline.decide import Wanted
from pipeline.desk import Desk
from pipeline.feeds import live_source, sampling, source_for, stage_source
from pipeline.inputs import inputs_digest
from pipeline.job import Interrupted, RunFailed
from pipeline.kept import forget_epochs, kept_epochs
from pipeline.layout import StagePaths
from pipeline.machine import described, whole_machine
from pipeline.ring import ring_of
from pipeline.seconds import cache_costs
from pipeline.start import begin_from_file
from stages.adaptive import Settle
from stages.arm import Arm, Hooks, Result
from stages.blind import blind_record, nothing_learnt
from stages.book import Diverged
from stages.checkpoint import CheckpointError, Progress
from stages.crowd import others
from stages.encode import frozen_encoder
from stages.endings import Settling
from stages.images import spread
from stages.optim import Rates, build_optimizer, parameter_groups
from stages.pictures import reconstructions
from stages.probe import ProbeResult, evaluate
from stages.segment import Segment, trained_epochs
from stages.sources import Source
from stages.train import Build, build_model, train_arm
from stages.views import centre_batch


def train_stage(desk: Desk, stage: int) -> None:
    """Stage 0 trains everything from images; a later one the blocks behind its cut, from the cache where it has one."""
    wanted = desk.wanted
    spec = wanted.spec(wanted.features(stage, 0)) if stage in wanted.cached_stages else None
    if stage and not spec:
        desk.log.message(f"stage {stage}: its frozen blocks run live, for want of cache.budget_gb; see `make explain`")
    before = 0
    for part in wanted.asked(stage):
        if gone := [head.name for head in wanted.heads if before < head.block <= part.cut]:
            names = (f"from epoch {part.first_epoch} on " if part.in_place else "") + ", ".join(gone)
            desk.log.message(f"stage {stage}: {names} read frozen blocks and are gone, with their losses")
        before = part.cut
    if raised := wanted.raised_heads(stage):
        names, cut = ", ".join(head.name for head in raised), wanted.segments[stage].cut
        desk.log.message(f"stage {stage}: {names}: block {cut} of the average in place of frozen ones")
    if wanted.renewed(wanted.asked(stage)[0]):
        desk.log.message(f"stage {stage}: its decoders begin anew, decoder.carry = false")
    with ring_of(desk, stage) as ring:
        train(
            desk,
            wanted.paths.stage(stage),
            stage_arm(wanted, stage, desk.log.message),
            inputs=wanted.stage_inputs(stage),
            facts={"cut": wanted.cut(stage), "cache": spec.fingerprint if spec else None},
            costs=lambda: cache_costs(wanted, stage),
            feed=lambda part: stage_source(ring, part),
        )


def train_baseline(desk: Desk, arm: str) -> None:
    """Both baselines go on from the end of stage 0 through all later epochs: e2e freezes nothing; freeze freezes as the
    stages do and runs the frozen blocks forward on every step."""
    wanted = desk.wanted
    facts = {"cut": wanted.arm_segments(arm)[-1].cut, "cache": None}
    train(desk, wanted.paths.arm(arm), baseline_arm(wanted, arm, desk.log.message), wanted.arm_inputs(arm), facts)


def stage_arm(wanted: Wanted, stage: int, tell: Callable[[str], None]) -> Arm:
    """What a stage trains; its caches are there, and a ring of views has turned."""
    return _arm(
        wanted,
        wanted.paths.stage(stage),
        tag={"stage": stage},
        segments=wanted.asked(stage),
        build=masked_build(wanted, stage, stage in wanted.cached_stages),
        source=lambda segment: source_for(wanted, stage),
        start=wanted.paths.stage(stage - 1).state if stage else None,
        inputs=wanted.stage_inputs(stage),
        tell=tell,
        settling=settling(wanted, stage),
    )


def baseline_arm(wanted: Wanted, arm: str, tell: Callable[[str], None]) -> Arm:
    """What a baseline arm trains."""
    return _arm(
        wanted,
        wanted.paths.arm(arm),
        tag={"arm": arm},
        segments=wanted.arm_segments(arm),
        build=masked_build(wanted, 1, cached=False),
        source=lambda segment: live_source(wanted, segment),
        start=wanted.paths.stage(0).state,
        inputs=wanted.arm_inputs(arm),
        tell=tell,
        freezes=arm != "e2e",
    )


def _arm(
    wanted: Wanted,
    paths: StagePaths,
    tag: dict[str, Any],
    segments: tuple[Segment, ...],
    build: Build,
    source: Callable[[Segment], Source],
    start: Path | None,
    inputs: dict[str, Any],
    tell: Callable[[str], None],
    settling: Settling | None = None,
    freezes: bool = True,
) -> Arm:
    """tell: hears what a checkpoint file that training starts from was found to hold."""
    config = wanted.config
    return Arm(
        tag=tag,
        segments=segments,
        memory=config.cache.memory,
        make=lambda part: build_model(build, part.cut, config.train.device, part.entry, wanted.renewed(part)),
        optimizer=lambda model: optimizer_of(wanted, model, freezes),
        train=config.train,
        rates=rates(wanted, freezes),
        source=source,
        state=paths.state,
        start=start,
        inputs=inputs_digest(inputs),
        eval_every=config.eval.every,
        keep={epoch: paths.epoch(epoch) for epoch in kept_epochs(config.train.save_epochs, segments)},
        settling=settling,
        begin=lambda model: begin_from_file(wanted, model, tell),
        heads_of=wanted.renewed,
    )


def train(
    desk: Desk,
    paths: StagePaths,
    arm: Arm,
    inputs: dict[str, Any],
    facts: dict[str, Any],
    costs: Callable[[], dict[str, float | None]] = lambda: {"cache_seconds": 0.0},
    feed: Callable[[Segment], Source] | None = None,
) -> None:
    """Train an arm to its end and write its record, model and final state. Raises Interrupted with the state saved.

    costs: what its caches have cost by now; a ring of views goes on costing while it trains.
    feed: what a segment trains on where asking for it does something, as turning a ring does; the arm's own source
    only looks.
    """
    wanted = desk.wanted
    if (wanted.record(paths) or {}).get("fingerprint") != arm.inputs:
        forget_epochs(paths)
    record = facts | costs() | {"parent": parent_of(wanted, arm.start), "inputs": inputs}
    trained_on = replace(arm, source=feed or arm.source)
    done = carry_out(desk, paths, trained_on, record, lambda model: evaluate_encoder(wanted, model.encoder))
    done.record.update(costs())
    scores = {name: done.progress.curve[-1][name] for name in ("knn_top1", "linear_top1")}
    trained = done.progress.totals
    segment = arm.segments[len(trained) - 1]
    blind = blind_record(done.model, arm.source(segment), segment, trained[-1].steps, arm.train)
    done.record.update({"blind_losses": blind} if blind else {})
    if told := nothing_learnt(trained[-1].mean_loss, blind):
        desk.log.message(f"{arm.label}: {told}")
    finish_record(paths, done, done.model.encoder.vit.state_dict(), scores)
    if isinstance(done.model, MaskedModel):
        step, place = sum(part.steps for part in trained), segment.first_step + trained[-1].steps
        show_reconstructions(desk, done.model, paths, arm.label, step, place / wanted.total_steps)


@dataclass(frozen=True)
class Done:
    """An arm that has been trained to its end, and its record so far."""

    arm: Arm
    record: dict[str, Any]
    progress: Progress
    model: Learner


def carry_out(
    desk: Desk, paths: StagePaths, arm: Arm, facts: dict[str, Any], evaluate: Callable[[Any], Result]
) -> Done:
    """Train an arm, its record saying so from the start. Raises Interrupted with the state saved, or RunFailed."""
    segments, team = arm.segments, desk.job.team
    record = arm.tag | facts | {"status": "running", "fingerprint": arm.inputs}
    record |= {"epochs": trained_epochs(segments)}
    made = {"machine": described(desk.wanted.config, team.rank.ranks), "scored": desk.wanted.scored}
    record |= {key: so_far(desk.wanted.record(paths), arm.inputs, key, now) for key, now in made.items()}
    write_record(paths, record)
    hooks = Hooks(
        log=desk.log,
        evaluate=evaluate,
        stop=desk.job.stop.is_set,
        keep=lambda path, model: write_weights(path, model.encoder.vit.state_dict()),
        others=others if whole_machine() else None,
    )
    try:
        with team.assembled({"tag": arm.tag, "from": facts.get("from"), "inputs": facts["inputs"]}):
            progress, model = train_arm(arm, hooks, team)
    except Diverged as error:
        write_record(paths, record | {"status": "failed"})
        raise RunFailed(str(error)) from error
    if progress.segment < len(segments):
        done = sum(totals.steps for totals in progress.totals)
        raise Interrupted(
            f"interrupted: {arm.label} is saved at step {done} of {sum(s.steps for s in segments)}; "
            "the same command goes on from there"
        )
    if progress.ended:
        desk.log.message(f"{arm.label}: ended at epoch {progress.ended['epoch']:g}, {progress.ended['why']}")
        record["epochs"] = sum(part.steps for part in progress.totals) / segments[0].steps_per_epoch
    return Done(arm, record, progress, model)


def show_reconstructions(
    desk: Desk, model: MaskedModel, paths: StagePaths, label: str, step: int, progress: float
) -> None:
    """A figure of what the decoder fills in, where it predicts pixels, when `progress` of the run is done; also in
    TensorBoard, at `step` of the part."""
    from pipeline.figures import reconstructions as draw

    config = desk.wanted.config
    rows = reconstructions(model, desk.wanted.data.val, sampling(desk.wanted), config.train.precision, progress)
    if rows is not None:
        place = paths.root.name
        draw(rows, label, desk.wanted.paths.figures / f"reconstructions-{place}.png")
        desk.log.picture(place, np.concatenate(np.concatenate(rows, axis=2), axis=0), step)


def finish_record(paths: StagePaths, done: Done, state: dict[str, Tensor], scores: dict[str, Any]) -> None:
    """Write the weights, then the record that says `done` and what came of it."""
    progress, depth = done.progress, done.model.encoder.depth
    write_weights(paths.model, state)
    totals = progress.totals
    seconds, images = progress.train_seconds, sum(part.images for part in totals)
    files = (paths.model, paths.state)
    write_record(
        paths,
        done.record
        | {
            "status": "done",
            "steps": sum(part.steps for part in totals),
            "images": images,
            "train_seconds": seconds,
            "loader_wait_seconds": sum(part.loader_wait_seconds for part in totals),
            "crowded_seconds": progress.crowded_seconds,
            "evaluate_seconds": sum(part.evaluate_seconds for part in totals),
            "images_per_second": images / seconds if seconds else 0.0,
            "first_loss": totals[0].first_loss,
            "final_loss": totals[-1].mean_loss,
            **scores,
            "curve": progress.curve,
            "ended": progress.ended,
            **({"checks": progress.checks} if progress.checks else {}),
            **({"read": progress.read} if progress.read else {}),
            "segments": [
                {
                    "cut": segment.cut,
                    "epochs": part.steps / segment.steps_per_epoch,
                    "images": part.images,
                    "train_seconds": part.train_seconds,
                    "images_per_second": part.images / part.train_seconds if part.train_seconds else 0.0,
                }
                for segment, part in zip(done.arm.segments, totals, strict=not progress.ended)
            ],
            "state": file_checksum(paths.state),
            "weights": file_checksum(paths.model),
            "frozen_weights": {str(cut): frozen_hash(state, cut) for cut in range(1, depth + 1)},
            "files": {str(file.relative_to(paths.root)): file.stat().st_size for file in files},
        },
    )


def write_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write weights by timm's parameter names, all or nothing."""
    atomic_write(path, save({name: value.detach().cpu().contiguous() for name, value in state.items()}))


def evaluate_encoder(wanted: Wanted, encoder: Encoder) -> ProbeResult:
    """kNN and linear probe of an encoder, as the settings ask."""
    config = wanted.config
    size, device, precision = config.model.image_size, config.train.device, config.train.precision
    return evaluate(encoder, wanted.data, config.eval, size, device, precision)


def masked_build(wanted: Wanted, stage: int, cached: bool) -> Build:
    """What makes the masked model of a stage, or of an arm that goes on from stage 0 as stage 1 does.

    A frozen teacher's features are read by `cached` training, which therefore does not run it.
    """
    config = wanted.config
    teacher: Callable[[Encoder], Teacher] | None = None
    if config.teacher.kind == "ema":
        teacher = partial(EmaTeacher, momentum=config.teacher.momentum)
    elif stage and not cached:
        teacher = partial(frozen_teacher, wanted)
    drop = DepthDrop(config.seed, config.train.drop_path, config.train.layer_drop, wanted.total_steps)
    visible = sampling(wanted).keep(0.0)
    return Build(config.seed, config.model, config.decoder, wanted.heads_of(stage), teacher, drop, visible)


def frozen_teacher(wanted: Wanted, student: Encoder) -> Teacher:
    """The encoder that stage 0 ended with; an untrained one before that, whose speed is the same."""
    config, paths, depth = wanted.config, wanted.paths.stage(0), student.depth
    weights = (wanted.record(paths) or {}).get("frozen_weights", {}).get(str(depth))
    if weights:
        return Teacher(frozen_encoder(str(paths.model.absolute()), weights, depth, config.model, config.train.device))
    return Teacher(copy.deepcopy(student))


def optimizer_of(wanted: Wanted, model: Learner, freezes: bool = True) -> torch.optim.Optimizer:
    """The optimiser of what a model lets learn."""
    train = wanted.config.train
    return build_optimizer(parameter_groups(model, train.weight_decay, rates(wanted, freezes).by_layer), train)


def rates(wanted: Wanted, freezes: bool = True) -> Rates:
    """The learning rates of the run; where nothing freezes, as in the e2e arm, all layers follow the plain schedule."""
    config: PipelineConfig = wanted.config
    return Rates(
        train=config.train,
        schedule=config.schedule,
        num_blocks=wanted.identity["depth"],
        total_steps=wanted.total_steps,
        steps_per_epoch=wanted.steps_per_epoch,
        stage_starts=tuple(segment.first_step for segment in wanted.segments),
        freezes=freezes,
    )


def settling(wanted: Wanted, stage: int) -> Settling | None:
    """What an adaptive stage watches; None where its length is given, or no candidate is left."""
    schedule, images = wanted.config.schedule, wanted.data.train
    if not wanted.adaptive or stage + 1 >= len(schedule.cuts):
        return None
    return Settling(
        rule=Settle(schedule.settle_metric, schedule.settle_below, schedule.settle_checks),
        cut=schedule.cuts[stage + 1],
        every=schedule.check_every,
        images=torch.from_numpy(
            centre_batch(images, spread(len(images), schedule.probe_images), wanted.config.model.image_size)
        ),
    )


def parent_of(wanted: Wanted, start: Path | None) -> str | None:
    """The fingerprint of the stage whose state is started from. Raises CheckpointError when that file was altered."""
    if start is None:
        return None
    record = wanted.record(StagePaths(start.parents[1]))
    assert record is not None, "the stage before is trained first"
    if not start.exists() or file_checksum(start) != record["state"]:
        raise CheckpointError(
            f"{start} is not the state that its stage ended with; delete {start.parents[1]} to train it anew"
        )
    return str(record["fingerprint"])


def file_checksum(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(paths: StagePaths, record: dict[str, Any]) -> None:
    paths.root.mkdir(parents=True, exist_ok=True)
    atomic_write(paths.json, (json.dumps(record, indent=2) + "\n").encode())
