"""The training loop, one for every stage and arm. An arm is a list of segments trained in turn; a stage is an arm, of
several segments where blocks freeze in place. Everything random is a pure function of the seed and the step: a saved
state is all that a resume needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cache.loader import Prefetch, Spent
from models.config import DecoderConfig, HeadSpec, ModelConfig, learning_heads
from models.drop import DepthDrop
from models.learner import Learner
from models.mim import MaskedModel
from models.multiscale import build_heads
from models.targets import constant
from models.teacher import Teacher
from models.vit import Encoder, build_encoder
from stages.arm import Arm, Hooks
from stages.book import Book
from stages.checkpoint import (
    CheckpointError,
    Progress,
    SegmentTotals,
    apply_tensors,
    model_tensors,
    read_state,
    save_state,
    state_digest,
    without_heads,
)
from stages.compiling import compile_learner, compiles
from stages.config import TrainConfig
from stages.device import autocast
from stages.endings import PROBE, Watch, stopped_early
from stages.optim import averaged, to_average, to_training
from stages.passed import passed_unkept, told_unkept
from stages.segment import Segment
from stages.sources import Source, StepInputs
from stages.team import SOLO, Team

LOG_EVERY = 10
"""Optimiser steps between two logged events; the loss is fetched from the device no more often."""


@dataclass(frozen=True)
class Build:
    """Settings that make a masked model."""

    seed: int
    model: ModelConfig
    decoder: DecoderConfig
    heads: tuple[HeadSpec, ...]
    teacher: Callable[[Encoder], Teacher] | None = None
    """Makes the teacher of a student that is on its device; None where no target is made live by one."""
    drop: DepthDrop | None = None
    visible: int = 0
    """Tokens of an image that the encoder mostly sees; 0 means all."""


def build_model(build: Build, cut: int, device: str, entry: int | None = None, stage: int = 0) -> MaskedModel:
    """The masked model at a cut, its weights a pure function of the seed. Heads of frozen blocks are left out.

    entry: the block at which inputs enter where that is not the cut, since blocks before it freeze in place.
    stage: the one that heads are drawn for; what else there is does not depend on it.
    """
    encoder = build_encoder(build.model, build.seed)
    specs = learning_heads(build.heads, cut, entry)
    heads = build_heads(specs, build.decoder, encoder, build.model.patch_size, build.seed, stage)
    model = MaskedModel(encoder, heads, cut, entry)
    model.set_attention(build.model.attention, device, build.visible or encoder.num_tokens)
    model.to(device)
    if build.teacher and model.taught:
        model.teacher = build.teacher(encoder)  # before dropping is installed: an average drops nothing
    if build.drop:
        build.drop.install(encoder)
        model.drop = build.drop
    return model


def train_step(
    model: Learner,
    optimizer: torch.optim.Optimizer,
    source: Source,
    inputs: StepInputs,
    train: TrainConfig,
    team: Team = SOLO,
) -> Tensor:
    """One optimiser step; returns (1 + H + W,): the weighted sum that is learned from, every loss, what is watched.

    Micro-batches are equal: the mean of their losses is the batch's loss. So are the shares of ranks; what is returned
    is of this rank's.
    """
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    weights = constant(model.loss_weights(inputs.progress), device)
    total = torch.zeros(1 + len(weights) + len(model.watch_names), device=device)
    with model.dropping(inputs.step):
        for part, micro in enumerate(inputs.to(device).split(train.accumulate), 1):
            with team.summing(last=part == train.accumulate):
                with autocast(device, train.precision):
                    batch, losses = team.forward(model, source, micro)
                    losses = losses / train.accumulate
                    loss = (losses * weights).sum()
                loss.backward()
            watched = model.watch(batch).to(device) / train.accumulate
            total += torch.cat([loss.detach().reshape(1), losses.detach(), watched])
    if train.clip:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], train.clip)
    optimizer.step()
    model.after_step(inputs.step)
    return total


def train_arm(arm: Arm, hooks: Hooks, team: Team = SOLO) -> tuple[Progress, Learner]:
    """Train what is left of the arm's segments. When `hooks.stop` asks, the state is saved and progress is unfinished.

    Of several ranks all train; the leader alone evaluates, decides when the arm ends, and writes.
    Raises CheckpointError when the state to start from, or to go on from, cannot be used, RanksDiffer when the ranks
    read different ones.
    """
    torch.set_num_threads(team.threads(arm.train.threads))
    progress, tensors = starting_point(arm)
    if team.rank.ranks > 1:
        team.same("state to start from", state_digest(progress.to_json(), tensors or {}))
    watch = Watch(arm.settling, arm.train, (tensors or {}).get(PROBE)) if arm.settling else None
    while True:
        done = progress.segment == len(arm.segments)
        segment = arm.segments[len(progress.totals) - 1 if done else progress.segment]  # an early end leaves some out
        model = arm.make(segment)
        if tensors is None:
            arm.begin(model)
        if not done:
            team.take(model, arm.train)
        if not team.sharded and compiles(arm.train, model, segment.steps):
            compile_learner(model)
        optimizer = arm.optimizer(model)
        if tensors is not None:
            renews = not done and not progress.step and arm.renews_heads(progress.segment)
            apply_tensors(model, optimizer, without_heads(tensors) if renews else tensors)
        if done:
            return progress, model
        to_training(optimizer)
        train_segment(arm, segment, model, optimizer, progress, hooks, watch, team)
        if progress.step < segment.steps and not progress.ended:
            return progress, model
        to_average(optimizer)
        progress.segment, progress.step = (len(arm.segments) if progress.ended else progress.segment + 1), 0
        tensors = model_tensors(model, optimizer)
        if watch and progress.segment < len(arm.segments):  # what comes after the arm looks at blocks of its own
            tensors |= watch.tensors
        if team.leads:
            save_state(arm.state, arm.inputs, progress, tensors)


def starting_point(arm: Arm) -> tuple[Progress, dict[str, Tensor] | None]:
    """Where to go on: the arm's own state, else the state it starts from, else nothing.

    An arm that is done and lacks an encoder that it is to keep is trained again. CheckpointError for one that is not
    done: what it has trained is not to go for that without a word.
    """
    if arm.state.exists():
        inputs, progress, tensors = read_state(arm.state)
        lost = passed_unkept(arm.keep, arm.segments, [totals.steps for totals in progress.totals])
        if inputs == arm.inputs and lost and progress.segment < len(arm.segments):
            raise CheckpointError(told_unkept(lost[0], arm.keep[lost[0]], arm.state, arm.label))
        if inputs == arm.inputs and not lost:
            return progress, tensors
    if arm.start is None:
        return Progress(), None
    if not arm.start.exists():
        raise CheckpointError(f"{arm.start} is missing, and {arm.label} starts from it; run `make explain`")
    return Progress(), read_state(arm.start)[2]


def train_segment(
    arm: Arm,
    segment: Segment,
    model: Learner,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    hooks: Hooks,
    watch: Watch | None = None,
    team: Team = SOLO,
) -> None:
    """Train a segment from `progress.step` on, until its end or until told to stop, with its time split into parts."""
    if len(progress.totals) == progress.segment:
        progress.totals.append(SegmentTotals())
    source = team.source(lambda: arm.source(segment), arm.train.accumulate)
    book = Book(arm, segment, progress, hooks, model, team)
    with averaged(optimizer):  # every later check, too, looks at the weights that a schedule-free stage would end with
        whole = team.whole(model, lambda: arm.make(segment)) if watch or not segment.steps else None
        if watch and whole:
            watch.look(whole.encoder)
    if not segment.steps:  # a checkpoint taken as it is
        if whole:
            book.evaluate(whole)
        return
    steps = range(progress.step, segment.steps)
    with loader(source, segment, steps, arm.train, arm.memory) as batches:
        for step, inputs in zip(steps, batches, strict=True):
            rate = arm.rates.apply(optimizer, segment.first_step + step)
            book.step(train_step(model, optimizer, source, inputs, arm.train, team), rate, inputs.read)
            if due(step + 1, LOG_EVERY) or step + 1 == segment.steps:
                book.flush(batches.spent)
            take_stock(arm, segment, model, optimizer, book, watch, batches.spent)
            if progress.ended:
                return
            stop, save = team.agreed(hooks.stop(), book.save_due())
            if stop or save:
                book.flush(batches.spent)
                team.same_weights(f"model after step {progress.step}", model)
                tensors = model_tensors(model, optimizer, keep=team.leads) | (watch.tensors if watch else {})
                if team.leads:
                    save_state(arm.state, arm.inputs, progress, tensors)
            if stop:
                return


def loader(
    source: Source, segment: Segment, steps: Iterable[int], train: TrainConfig, memory: float
) -> Prefetch[int, StepInputs]:
    """The inputs of a segment's steps, made ahead in a ring of at most `memory` bytes."""
    return Prefetch(
        lambda step, into: source.load(segment, step, into),
        steps,
        train.loader_threads,
        train.prefetch,
        memory,
        device=train.device if train.device.startswith("cuda") else None,
    )


def take_stock(
    arm: Arm,
    segment: Segment,
    model: Learner,
    optimizer: torch.optim.Optimizer,
    book: Book,
    watch: Watch | None,
    spent: Spent,
) -> None:
    """What is due after a step: a check of what may have settled, an encoder to keep, an evaluation; and whether the
    arm ends here, before its last step."""
    progress, step = book.progress, book.progress.step
    epoch, rest = divmod(segment.first_step + step, segment.steps_per_epoch)
    keep = None if rest else arm.keep.get(epoch)
    so_far = segment.first_step - arm.segments[0].first_step + step
    check = watch is not None and due(so_far, watch.settling.steps(segment.steps_per_epoch))
    evaluate = evaluation_due(arm, segment, step)
    if rest and not (check or evaluate):
        return
    last = step == segment.steps and segment == arm.segments[-1]
    book.flush(spent)
    with averaged(optimizer):
        looked_at = watch is not None or keep is not None or evaluate
        whole = book.team.whole(model, lambda: arm.make(segment)) if looked_at else None
        if watch and check and whole:
            book.check(watch, whole)
        if watch and not rest and not last:
            book.end(watch.settling.why_settled(progress.checks))
        if keep and whole:
            book.keep(keep, whole)
        if (evaluate or progress.ended) and whole:
            book.evaluate(whole)
    if evaluate and not last:
        book.end(stopped_early(progress.curve, arm.train.early_stop))
    progress.ended = book.team.told(progress.ended)


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def evaluation_due(arm: Arm, segment: Segment, step: int) -> bool:
    """At a stage's end, and after every `eval_every` epochs that the run has trained."""
    epoch, rest = divmod(segment.first_step + step, segment.steps_per_epoch)
    ends = step == segment.steps and segment.ends_stage
    return ends or (rest == 0 and due(epoch, arm.eval_every))
