"""The accounts of a segment in training: its losses, its seconds by part, its events, the probe curve, and the reasons
for which an arm ends. The training loop keeps them; they are part of `Progress`, which is saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cache.loader import Spent
from models.learner import Learner
from stages.arm import Arm, Hooks
from stages.checkpoint import Progress
from stages.crowd import Crowd
from stages.endings import Watch
from stages.replay import Reading, note
from stages.segment import Segment
from stages.team import SOLO, Team


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


class Book:
    """Keeps the accounts of a segment: losses, seconds by part, events, the probe curve."""

    def __init__(
        self, arm: Arm, segment: Segment, progress: Progress, hooks: Hooks, model: Learner, team: Team = SOLO
    ) -> None:
        self.arm, self.segment, self.progress, self.hooks = arm, segment, progress, hooks
        self.model, self.team = model, team
        self.totals = progress.totals[progress.segment]
        self.watch = Stopwatch(hooks.now)
        one_process_on_cores = team.rank.ranks == 1 and not arm.train.device.startswith("cuda")
        self.crowd = Crowd(arm.train.threads, hooks.others) if hooks.others and one_process_on_cores else None
        self.pending: list[Tensor] = []
        self.recent: list[list[float]] = []
        self.spent = Spent()
        self.rate = 0.0
        self.saved = hooks.now()

    def step(self, losses: Tensor, rate: float, read: Reading | None = None) -> None:
        """Count one optimiser step; its losses, the total first, stay on the device until the next flush. `read` is
        what it was trained on."""
        if read:
            step, epoch = self.progress.step, self.segment.epoch(self.progress.step)
            note(self.progress.read, epoch, step % self.segment.steps_per_epoch, read)
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
        losses = self.team.mean(torch.stack(self.pending)).tolist() if self.pending else []
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

    def flush(self, spent: Spent) -> None:
        """Bring the accounts up to date and log an event. `spent` is the loader's total since the loop began."""
        self.settle()
        losses, self.recent = self.recent, []
        seconds, loading = self.train_lap(), spent.since(self.spent)
        self.spent = spent
        self.totals.loader_wait_seconds += loading.wait_seconds
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
                    **self.speeds(len(losses), seconds, loading),
                }
            )

    def train_lap(self) -> float:
        """Count the seconds since the last lap as training time."""
        seconds = self.watch.lap()
        self.totals.train_seconds += seconds
        if self.crowd:
            self.totals.crowded_seconds = (self.totals.crowded_seconds or 0.0) + self.crowd.lap(seconds)
        return seconds

    def speeds(self, steps: int, seconds: float, loading: Spent) -> dict[str, float]:
        """images/s of training, of its steps were there no waiting, and of the loader's threads by themselves, where
        they worked; beside the step, which shares the cores, they look slower than `bench` finds them."""
        batch, waited = self.arm.train.batch_size, loading.wait_seconds
        found = {
            "images_per_second": steps * batch / seconds if seconds else 0.0,
            "loader_wait_fraction": waited / seconds if seconds else 0.0,
        }
        if seconds > waited:
            found["step_images_per_second"] = steps * batch / (seconds - waited)
        if loading.busy_seconds:
            found["loader_images_per_second"] = (
                loading.batches * batch * self.arm.train.loader_threads / loading.busy_seconds
            )
        return found

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
        seconds = self.watch.lap()
        self.totals.evaluate_seconds += seconds
        if self.crowd:
            self.crowd.lap(seconds)
        point = {
            "seconds": self.progress.train_seconds,
            "epoch": self.epoch,
            **result.point(),
        }
        self.progress.curve.append(point)
        self.hooks.log(self.arm.tag | {"probe": True} | point)

    @property
    def epoch(self) -> float:
        """Epochs trained, counted from stage 0."""
        return self.segment.trained(self.progress.step)

    def check(self, watch: Watch, model: Learner) -> None:
        """Measure how far the watched blocks have moved. It is part of the method, and so of its training time."""
        numbers = watch.check(model.encoder, self.epoch, self.progress.checks)
        self.train_lap()  # before an evaluation at the same point takes the lap
        self.progress.checks.append(numbers)
        self.hooks.log(self.arm.tag | numbers)

    def keep(self, path: Path, model: Learner) -> None:
        """Keep the encoder as it is here. That is training time, as saving a state is."""
        self.hooks.keep(path, model)
        self.train_lap()

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
