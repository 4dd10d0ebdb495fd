"""What the training loop can train: an encoder and what stands behind it, which give one loss or several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.drop import DepthDrop
from models.vit import Encoder


class Part(Protocol):
    """Something with weights that a saved state holds: a module, or an average of one."""

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> Any: ...


class Learner(nn.Module, ABC):
    """The encoder learns from block `encoder.cut` on; what a step learns from is made by a source of the same kind."""

    encoder: Encoder
    drop: DepthDrop | None = None
    """What the learning blocks drop at every step; None drops nothing."""

    @abstractmethod
    def forward(self, batch: Any) -> Tensor:
        """(H,): every loss of a batch."""

    @property
    @abstractmethod
    def loss_names(self) -> tuple[str, ...]:
        """What the entries of a loss are called."""

    @abstractmethod
    def loss_weights(self, progress: float) -> tuple[float, ...]:
        """How much each entry of a loss weighs when `progress` (0..1) of the run is done."""

    @property
    def idles(self) -> bool:
        """Whether a step may leave weights without gradient, alike on all ranks; the optimiser leaves them alone."""
        return self.drop is not None and self.drop.layer_drop > 0

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, Part]:
        """What a saved state holds the weights of, by the prefix of their names in it."""

    def dropping(self, step: int) -> AbstractContextManager[None]:
        """Within, the learning blocks drop what they drop at an optimiser step, counted from stage 0."""
        return self.drop.during(self.encoder, step) if self.drop else nullcontext()

    def after_step(self, step: int) -> None:
        """What follows the optimiser's step `step`, counted from stage 0."""

    @property
    def watch_names(self) -> tuple[str, ...]:
        """What the entries of `watch` are called in events."""
        return ()

    def watch(self, batch: Any) -> Tensor:
        """(W,): numbers about a batch that are logged beside its losses."""
        return torch.empty(0)

    def warning(self, watched: Mapping[str, float]) -> str:
        """What is wrong, judged by what is watched; empty where nothing is."""
        return ""
