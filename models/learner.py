"""What the training loop can train: an encoder and what stands behind it, which give one loss or several."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from models.vit import Encoder


class Learner(nn.Module, ABC):
    """The encoder learns from block `encoder.cut` on; what a step learns from is made by a source of the same kind."""

    encoder: Encoder

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
    @abstractmethod
    def parts(self) -> dict[str, nn.Module]:
        """The modules whose weights a saved state holds, by the prefix of their names in it."""
