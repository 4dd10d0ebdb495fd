"""The training loop, one for every stage and arm. An arm is a list of segments trained in turn; a stage is an arm of
one segment. Everything random is a pure function of the seed and the step: a saved state is all that a resume needs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cache.loader import prefetch
from models.config import DecoderConfig, HeadSpec, ModelConfig, learning_heads
from models.drop import DepthDrop
from models.learner import Learner
from models.mim import MaskedModel
from models.multiscale import build_heads
from models.teacher import Teacher
from models.vit import Encoder, build_encoder
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
from stages.segment import Segment
from stages.sources import Source, StepInputs

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


class Pace(Protocol):
    """How fast everything learns at every step of the plan."""

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rates of a step; returns the one that is told."""
        ...


class Result(Protocol):
    """What an evaluation came to."""

    def point(self) -> dict[str, float | None]:
        """Its numbers by name, as a point of the curve keeps them."""
        ...


@dataclass(frozen=True)
class Arm:
    """What to train: the segments in turn, from a state on disk or from scratch, into a folder."""

    tag: dict[str, Any]
    """{"stage": 1} or {"arm": "e2e"}: how events and messages name it."""
    segments: tuple[Segment, ...]
    make: Callable[[int], Learner]
    """The model at a cut, on its device, its weights a pure function of the seed."""
    optimizer: Callable[[Learner], torch.optim.Optimizer]
    train: TrainConfig
    rates: Pace
    source: Callable[[Segment], Source]
    state: Path
    start: Path | None
    inputs: str
    """Digest of what the arm was asked to do; a saved state of anything else is not gone on from."""
    section: str = "train"
    """Where the settings of `train` stand for the user: train, or finetune."""
    eval_every: int = 0
    """Epochs between evaluations; each segment's end is evaluated in any case."""
    begin: Callable[[Learner], None] = lambda model: None
    """What is done to a model that starts from no state, such as loading a checkpoint file."""

    @property
    def label(self) -> str:
        return " ".join(str(part) for pair in self.tag.items() for part in pair)


@dataclass(frozen=True)
class Hooks:
    """The rim: what the loop needs from outside."""

    log: Callable[[dict[str, Any]], None]
    evaluate: Callable[[Any], Result]
    """Scores the model that is trained."""
    stop: Callable[[], bool] = lambda: False
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


def build_model(build: Build, cut: int, device: str) -> MaskedModel:
    """The masked model at a cut, its weights a pure function of the seed. Heads of frozen blocks are left out."""
    encoder = build_encoder(build.model, build.seed)
    specs = learning_heads(build.heads, cut)
    heads = build_heads(specs, build.decoder, encoder, build.model.patch_size, build.seed)
    model = MaskedModel(encoder, heads, cut)
    model.set_attention(build.model.attention, device)
    model.to(device)
    if build.teacher and model.taught:
        model.teacher = build.teacher(encoder)  # before dropping is installed: an average drops nothing
    if build.drop:
        build.drop.install(encoder)
        model.drop = build.drop
    return model


def train_step(
    model: Learner, optimizer: torch.optim.Optimizer, source: Source, inputs: StepInputs, train: TrainConfig
) -> Tensor:
    """One optimiser step; returns (1 + H + W,): the weighted sum that is learned from, every loss, what is watched.

    Micro-batches are equal: the mean of their losses is the batch's loss.
    """
    device = next(model.parameters()).device
    optimizer.zero_grad(set_to_none=True)
    weights = torch.tensor(model.loss_weights(inputs.progress), device=device)
    total = torch.zeros(1 + len(weights) + len(model.watch_names), device=device)
    with model.dropping(inputs.step):
        for micro in inputs.to(device).split(train.accumulate):
            with autocast(device, train.precision):
                batch = source.mask(model, micro)
                losses = model(batch) / train.accumulate
                loss = (losses * weights).sum()
            loss.backward()
            watched = model.watch(batch).to(device) / train.accumulate
            total += torch.cat([loss.detach().reshape(1), losses.detach(), watched])
    if train.clip:
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], train.clip)
    optimizer.step()
    model.after_step(inputs.step)
    return total


def train_arm(arm: Arm, hooks: Hooks) -> tuple[Progress, Learner]:
    """Train what is left of the arm's segments. When `hooks.stop` asks, the state is saved and progress is unfinished.

    Raises CheckpointError when the state to start from, or to go on from, cannot be used.
    """
    torch.set_num_threads(arm.train.threads)
    progress, tensors = starting_point(arm)
    while True:
        segment = arm.segments[min(progress.segment, len(arm.segments) - 1)]
        model = arm.make(segment.cut)
        optimizer = arm.optimizer(model)
        if tensors is None:
            arm.begin(model)
        else:
            apply_tensors(model, optimizer, tensors)
        if progress.segment == len(arm.segments):
            return progress, model
        train_segment(arm, segment, model, optimizer, progress, hooks)
        if progress.step < segment.steps:
            return progress, model
        progress.segment, progress.step = progress.segment + 1, 0
        tensors = model_tensors(model, optimizer)
        save_state(arm.state, arm.inputs, progress, tensors)


def starting_point(arm: Arm) -> tuple[Progress, dict[str, Tensor] | None]:
    """Where to go on: the arm's own state, else the state it starts from, else nothing."""
    if arm.state.exists():
        inputs, progress, tensors = read_state(arm.state)
        if inputs == arm.inputs:
            return progress, tensors
    if arm.start is None:
        return Progress(), None
    if not arm.start.exists():
        raise CheckpointError(f"{arm.start} is missing, and {arm.label} starts from it; run `make explain`")
    return Progress(), read_state(arm.start)[2]


def train_segment(
    arm: Arm, segment: Segment, model: Learner, optimizer: torch.optim.Optimizer, progress: Progress, hooks: Hooks
) -> None:
    """Train a segment from `progress.step` on, until its end or until told to stop, with its time split into parts."""
    if len(progress.totals) == progress.segment:
        progress.totals.append(SegmentTotals())
    source = arm.source(segment)
    book = Book(arm, segment, progress, hooks, model)
    if not segment.steps:  # a checkpoint taken as it is
        book.evaluate(model)
        return
    steps = range(progress.step, segment.steps)
    with prefetch(
        lambda step: source.load(segment, step), steps, arm.train.loader_threads, arm.train.prefetch
    ) as batches:
        for step, inputs in zip(steps, batches, strict=True):
            rate = arm.rates.apply(optimizer, segment.first_step + step)
            book.step(train_step(model, optimizer, source, inputs, arm.train), rate)
            if due(step + 1, LOG_EVERY) or step + 1 == segment.steps:
                book.flush(batches.wait_seconds)
            if evaluation_due(arm, segment, step + 1):
                book.flush(batches.wait_seconds)
                book.evaluate(model)
            stop = hooks.stop()
            if stop or book.save_due():
                book.flush(batches.wait_seconds)
                save_state(arm.state, arm.inputs, progress, model_tensors(model, optimizer))
            if stop:
                return


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def evaluation_due(arm: Arm, segment: Segment, step: int) -> bool:
    """At the segment's end, and after every `eval_every` epochs of the whole plan."""
    epoch, rest = divmod(step, segment.steps_per_epoch)
    return step == segment.steps or (rest == 0 and due(segment.first_epoch + epoch, arm.eval_every))


class Book:
    """Keeps the accounts of a segment: losses, seconds by part, events, the probe curve."""

    def __init__(self, arm: Arm, segment: Segment, progress: Progress, hooks: Hooks, model: Learner) -> None:
        self.arm, self.segment, self.progress, self.hooks = arm, segment, progress, hooks
        self.model = model
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
                    f"lower {self.arm.section}.lr={self.arm.train.lr:g} or set {self.arm.section}.clip=1"
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
                    "epoch": self.segment.first_epoch + self.progress.step / self.segment.steps_per_epoch,
                    "images": sum(totals.images for totals in self.progress.totals),
                    **self.mean_losses(losses),
                    "lr": self.rate,
                    "images_per_second": len(losses) * self.arm.train.batch_size / seconds if seconds else 0.0,
                    "loader_wait_fraction": waited / seconds if seconds else 0.0,
                }
            )

    def mean_losses(self, losses: list[list[float]]) -> dict[str, Any]:
        """`loss`, what is learned from, each head's as `loss_<head>`, comparable over stages, and what is watched."""
        means = [sum(column) / len(losses) for column in zip(*losses, strict=True)]
        count = 1 + len(self.model.loss_names)
        heads = dict(zip((f"loss_{name}" for name in self.model.loss_names), means[1:count], strict=True))
        watched = dict(zip(self.model.watch_names, means[count:], strict=True))
        warning = self.model.warning(watched)
        told = {"loss": means[0]} | heads | watched
        return told | ({"warning": warning} if warning else {})

    def evaluate(self, model: Learner) -> None:
        """Add a point to the probe curve; its time is not training time."""
        result = self.hooks.evaluate(model)
        self.totals.evaluate_seconds += self.watch.lap()
        point = {
            "seconds": self.progress.train_seconds,
            "epoch": self.segment.first_epoch + self.progress.step / self.segment.steps_per_epoch,
            **result.point(),
        }
        self.progress.curve.append(point)
        self.hooks.log(self.arm.tag | {"probe": True} | point)

    def save_due(self) -> bool:
        """Whether `train.save_every` seconds have gone by since the last saved state."""
        if self.hooks.now() - self.saved < self.arm.train.save_every:
            return False
        self.saved = self.hooks.now()
        return True
