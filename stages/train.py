"""The training loop, one for every stage and arm. An arm is a list of segments trained in turn; a stage is an arm, of
several segments where blocks freeze in place. Everything random is a pure function of the seed and the step: a saved
state is all that a resume needs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache.loader import prefetch
from models.config import DecoderConfig, HeadSpec, ModelConfig, learning_heads
from models.learner import Learner
from models.mim import MaskedModel
from models.multiscale import build_heads
from models.vit import build_encoder
from stages.checkpoint import (
    CheckpointError,
    Progress,
    SegmentTotals,
    apply_tensors,
    model_tensors,
    read_state,
    save_state,
)
from stages.config import TrainConfig
from stages.device import autocast
from stages.endings import PROBE, Settling, Watch, stopped_early
from stages.optim import Rates, averaged, to_average, to_training
from stages.probe import ProbeResult
from stages.segment import Segment
from stages.sources import Inputs, Source

LOG_EVERY = 10
"""Optimiser steps between two logged events; the loss is fetched from the device no more often."""


@dataclass(frozen=True)
class Build:
    """Settings that make a masked model."""

    seed: int
    model: ModelConfig
    decoder: DecoderConfig
    heads: tuple[HeadSpec, ...]


@dataclass(frozen=True)
class Arm:
    """What to train: the segments in turn, from a state on disk or from scratch, into a folder."""

    tag: dict[str, Any]
    """{"stage": 1} or {"arm": "e2e"}: how events and messages name it."""
    segments: tuple[Segment, ...]
    make: Callable[[Segment], Learner]
    """The model of a segment, on its device, its weights a pure function of the seed."""
    optimizer: Callable[[Learner], torch.optim.Optimizer]
    train: TrainConfig
    rates: Rates
    source: Callable[[Segment], Source]
    state: Path
    start: Path | None
    inputs: str
    """Digest of what the arm was asked to do; a saved state of anything else is not gone on from."""
    eval_every: int = 0
    """Epochs between evaluations; each stage's end is evaluated in any case."""
    keep: Mapping[int, Path] = field(default_factory=dict)
    """Epochs of the whole run after which the encoder is kept, and where."""
    settling: Settling | None = None
    """What ends an adaptive stage."""

    @property
    def label(self) -> str:
        return " ".join(str(part) for pair in self.tag.items() for part in pair)


@dataclass(frozen=True)
class Hooks:
    """The rim: what the loop needs from outside."""

    log: Callable[[dict[str, Any]], None]
    evaluate: Callable[[Any], ProbeResult]
    """Scores the model that is trained."""
    stop: Callable[[], bool] = lambda: False
    keep: Callable[[Path, Any], object] = lambda path, model: None
    """Writes the encoder of the model that is trained."""
    now: Callable[[], float] = time.perf_counter


class Diverged(RuntimeError):
    """The loss is no longer a number."""


class Stopwatch:
    """Seconds since the last lap."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self.last = now()

    def lap(self) -> float:
        last, self.last = self.last, self.now()
        return self.last - last


def build_model(build: Build, cut: int, device: str, entry: int | None = None) -> MaskedModel:
    """The masked model at a cut, its weights a pure function of the seed. Heads of frozen blocks are left out.

    entry: the block at which inputs enter where that is not the cut, since blocks before it freeze in place.
    """
    encoder = build_encoder(build.model, build.seed)
    specs = learning_heads(build.heads, cut, entry)
    heads = build_heads(specs, build.decoder, encoder, build.model.patch_size, build.seed)
    model = MaskedModel(encoder, heads, cut, entry)
    model.set_attention(build.model.attention, device)
    return model.to(device)


def train_step(
    model: Learner, optimizer: torch.optim.Optimizer, source: Source, inputs: Inputs, train: TrainConfig
) -> Tensor:
    """One optimiser step; returns (1 + H,): the weighted sum that is learned from, then every loss.

    Micro-batches are equal: the mean of their losses is the batch's loss.
    """
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    weights = torch.tensor(model.loss_weights(inputs.progress), device=device)
    total = torch.zeros(1 + len(weights), device=device)
    for micro in inputs.to(device).split(train.accumulate):
        with autocast(device, train.precision):
            losses = model(source.mask(model, micro)) / train.accumulate
            loss = (losses * weights).sum()
        loss.backward()
        total += torch.cat([loss.detach().reshape(1), losses.detach()])
    if train.clip:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], train.clip)
    optimizer.step()
    return total


def train_arm(arm: Arm, hooks: Hooks) -> tuple[Progress, Learner]:
    """Train what is left of the arm's segments. When `hooks.stop` asks, the state is saved and progress is unfinished.

    Raises CheckpointError when the state to start from, or to go on from, cannot be used.
    """
    torch.set_num_threads(arm.train.threads)
    progress, tensors = starting_point(arm)
    seen = (tensors or {}).get(PROBE)
    while True:
        segment = arm.segments[min(progress.segment, len(arm.segments) - 1)]
        model = arm.make(segment)
        optimizer = arm.optimizer(model)
        if tensors is not None:
            apply_tensors(model, optimizer, tensors)
        if progress.segment == len(arm.segments):
            return progress, model
        to_training(optimizer)
        train_segment(arm, segment, model, optimizer, progress, hooks, seen)
        if progress.step < segment.steps and not progress.ended:
            return progress, model
        to_average(optimizer)
        progress.segment, progress.step = (len(arm.segments) if progress.ended else progress.segment + 1), 0
        tensors = model_tensors(model, optimizer)
        save_state(arm.state, arm.inputs, progress, tensors)


def starting_point(arm: Arm) -> tuple[Progress, dict[str, Tensor] | None]:
    """Where to go on: the arm's own state, else the state it starts from, else nothing."""
    if arm.state.exists():
        inputs, progress, tensors = read_state(arm.state)
        if inputs == arm.inputs and not passed_unkept(arm, progress):
            return progress, tensors
    if arm.start is None:
        return Progress(), None
    if not arm.start.exists():
        raise CheckpointError(f"{arm.start} is missing, and {arm.label} starts from it; run `make explain`")
    return Progress(), read_state(arm.start)[2]


def passed_unkept(arm: Arm, progress: Progress) -> list[int]:
    """Epochs to keep that lie behind a saved state and whose encoder is not there: only training anew brings it."""
    passed = {
        part.first_epoch + epoch
        for part, totals in zip(arm.segments, progress.totals, strict=False)
        for epoch in range(1, totals.steps // part.steps_per_epoch + 1)
    }
    return [epoch for epoch, path in arm.keep.items() if epoch in passed and not path.exists()]


def train_segment(
    arm: Arm,
    segment: Segment,
    model: Learner,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    hooks: Hooks,
    seen: Tensor | None = None,
) -> None:
    """Train a segment from `progress.step` on, until its end or until told to stop, with its time split into parts."""
    if len(progress.totals) == progress.segment:
        progress.totals.append(SegmentTotals())
    source = arm.source(segment)
    book = Book(arm, segment, progress, hooks, model.loss_names)
    watch = Watch(arm.settling, arm.train, seen) if arm.settling else None
    if watch:
        watch.look(model.encoder)
    steps = range(progress.step, segment.steps)
    with prefetch(
        lambda step: source.load(segment, step), steps, arm.train.loader_threads, arm.train.prefetch
    ) as batches:
        for step, inputs in zip(steps, batches, strict=True):
            rate = arm.rates.apply(optimizer, segment.first_step + step)
            book.step(train_step(model, optimizer, source, inputs, arm.train), rate)
            if due(step + 1, LOG_EVERY) or step + 1 == segment.steps:
                book.flush(batches.wait_seconds)
            take_stock(arm, segment, model, optimizer, book, watch, batches.wait_seconds)
            if progress.ended:
                return
            stop = hooks.stop()
            if stop or book.save_due():
                book.flush(batches.wait_seconds)
                tensors = model_tensors(model, optimizer) | (watch.tensors if watch else {})
                save_state(arm.state, arm.inputs, progress, tensors)
            if stop:
                return


def take_stock(
    arm: Arm,
    segment: Segment,
    model: Learner,
    optimizer: torch.optim.Optimizer,
    book: Book,
    watch: Watch | None,
    wait_seconds: float,
) -> None:
    """What is due after a step: a check of what may have settled, an encoder to keep, an evaluation; and whether the
    arm ends here, before its last step."""
    progress, step = book.progress, book.progress.step
    epoch, rest = divmod(step, segment.steps_per_epoch)
    keep = None if rest else arm.keep.get(segment.first_epoch + epoch)
    check = watch is not None and due(step, watch.settling.steps(segment.steps_per_epoch))
    evaluate = evaluation_due(arm, segment, step)
    if rest and not (check or evaluate):
        return
    last = step == segment.steps and segment == arm.segments[-1]
    book.flush(wait_seconds)
    with averaged(optimizer):
        if watch and check:
            book.check(watch, model)
        if watch and not rest and not last:
            book.end(watch.settling.why_settled(progress.checks))
        if keep:
            book.hooks.keep(keep, model)
        if evaluate or progress.ended:
            book.evaluate(model)
    if evaluate and not last:
        book.end(stopped_early(progress.curve, arm.train.early_stop))


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def evaluation_due(arm: Arm, segment: Segment, step: int) -> bool:
    """At a stage's end, and after every `eval_every` epochs of the whole plan."""
    epoch, rest = divmod(step, segment.steps_per_epoch)
    ends = step == segment.steps and segment.ends_stage
    return ends or (rest == 0 and due(segment.first_epoch + epoch, arm.eval_every))


class Book:
    """Keeps the accounts of a segment: losses, seconds by part, events, the probe curve."""

    def __init__(
        self, arm: Arm, segment: Segment, progress: Progress, hooks: Hooks, loss_names: tuple[str, ...]
    ) -> None:
        self.arm, self.segment, self.progress, self.hooks, self.loss_names = arm, segment, progress, hooks, loss_names
        self.totals = progress.totals[progress.segment]
        self.watch = Stopwatch(hooks.now)
        self.pending: list[Tensor] = []
        self.recent: list[list[float]] = []
        self.waited = 0.0
        self.rate = 0.0
        self.saved = hooks.now()

    def step(self, losses: Tensor, rate: float) -> None:
        """Count one optimiser step; its losses, the total first, stay on the device until the next flush."""
        if self.progress.step % self.segment.steps_per_epoch == 0:
            self.settle()
            self.totals.loss_sum, self.totals.loss_steps = 0.0, 0
        self.pending.append(losses)
        self.progress.step += 1
        self.totals.steps += 1
        self.totals.images += self.arm.train.batch_size
        self.rate = rate

    def settle(self) -> None:
        """Fetch the pending losses from the device, which waits for its work to be done."""
        losses = torch.stack(self.pending).tolist() if self.pending else []
        self.pending.clear()
        if losses and self.totals.first_loss is None:
            self.totals.first_loss = losses[0][0]
        for loss, *_ in losses:
            if not math.isfinite(loss):
                raise Diverged(
                    f"{self.arm.label}: loss={loss} near step {self.progress.step}; "
                    f"lower train.lr={self.arm.train.lr:g} or set train.clip=1"
                )
            self.totals.loss_sum += loss
        self.totals.loss_steps += len(losses)
        self.recent += losses

    def flush(self, wait_seconds: float) -> None:
        """Bring the accounts up to date and log an event. `wait_seconds` is the loader's total since the loop began."""
        self.settle()
        losses, self.recent = self.recent, []
        seconds, waited = self.watch.lap(), wait_seconds - self.waited
        self.waited = wait_seconds
        self.totals.train_seconds += seconds
        self.totals.loader_wait_seconds += waited
        if losses:
            self.hooks.log(
                self.arm.tag
                | {
                    "step": sum(totals.steps for totals in self.progress.totals),
                    "steps": sum(segment.steps for segment in self.arm.segments),
                    "epoch": self.epoch,
                    "images": sum(totals.images for totals in self.progress.totals),
                    **self.mean_losses(losses),
                    "lr": self.rate,
                    "images_per_second": len(losses) * self.arm.train.batch_size / seconds if seconds else 0.0,
                    "loader_wait_fraction": waited / seconds if seconds else 0.0,
                }
            )

    def mean_losses(self, losses: list[list[float]]) -> dict[str, float]:
        """`loss`, what is learned from, and each head's as `loss_<head>`: comparable over stages with other heads."""
        means = [sum(column) / len(losses) for column in zip(*losses, strict=True)]
        return {"loss": means[0]} | dict(zip((f"loss_{name}" for name in self.loss_names), means[1:], strict=True))

    def evaluate(self, model: Learner) -> None:
        """Add a point to the probe curve; its time is not training time."""
        result = self.hooks.evaluate(model)
        self.totals.evaluate_seconds += self.watch.lap()
        point = {
            "seconds": self.progress.train_seconds,
            "epoch": self.epoch,
            "knn_top1": result.knn_top1,
            "linear_top1": result.linear_top1,
            "feature_std": result.feature_std,
            "effective_rank": result.effective_rank,
            "probe_images": result.images,
        }
        self.progress.curve.append(point)
        self.hooks.log(self.arm.tag | {"probe": True} | point)

    @property
    def epoch(self) -> float:
        """Epochs done, counted from stage 0."""
        return self.segment.first_epoch + self.progress.step / self.segment.steps_per_epoch

    def check(self, watch: Watch, model: Learner) -> None:
        """Measure how far the watched blocks have moved. It is part of the method, and so of its training time."""
        numbers = watch.check(model.encoder, self.epoch, self.progress.checks)
        self.progress.checks.append(numbers)
        self.hooks.log(self.arm.tag | numbers)

    def end(self, why: str) -> None:
        """Let the arm end here, if there is a reason."""
        if why and not self.progress.ended:
            self.progress.ended = {"why": why, "epoch": self.epoch}
            self.hooks.log(self.arm.tag | {"ended": why, "epoch": self.epoch})

    def save_due(self) -> bool:
        """Whether `train.save_every` seconds have gone by since the last saved state."""
        if self.hooks.now() - self.saved < self.arm.train.save_every:
            return False
        self.saved = self.hooks.now()
        return True
