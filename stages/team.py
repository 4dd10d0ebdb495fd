"""Who trains an arm together: here one process by itself, in `ranks` several that share every batch. The training loop
asks its team at the few places where being several matters. Free of torch, so that one process loads nothing for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

from cache.rank import ALONE, Rank

if TYPE_CHECKING:
    from torch import Tensor

    from models.learner import Learner
    from stages.config import TrainConfig
    from stages.sources import Source

T = TypeVar("T")


class RanksDiffer(ValueError):
    """Ranks that do not work on the same thing."""


class Team:
    """One process: it leads, its batch is the whole batch, and nobody has to be asked or told."""

    rank: Rank = ALONE
    sharded = False
    """Whether every rank holds only a part of the weights."""

    @property
    def leads(self) -> bool:
        """Whether this process writes, evaluates and decides."""
        return self.rank.rank == 0

    def threads(self, asked: int) -> int:
        """Torch's threads in this process, of those that a machine gives to training."""
        return asked

    def assembled(self, order: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Within, the other ranks train what the leader orders."""
        return nullcontext()

    def take(self, model: Learner, train: TrainConfig) -> None:
        """Make a model the one that is trained together, before its optimiser is made."""

    def source(self, make: Callable[[], Source], parts: int) -> Source:
        """What a segment learns from: the leader makes it first, which may build a cache, however long that takes.

        parts: the micro-batches of a step, each of which all ranks share.
        """
        return make()

    def forward(self, model: Learner, source: Source, micro: Any) -> tuple[Any, Tensor]:
        """A micro-batch as the model learns from it, and its losses (H,)."""
        batch = source.mask(model, micro)
        return batch, model(batch)

    def summing(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch: after the step's last, gradients are the ranks' mean."""
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """The ranks' mean of equally shaped values."""
        return values

    def agreed(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Whether any rank is to stop, and whether the leader wants to save: the same answer on all ranks."""
        return stop, save

    def told(self, value: T) -> T:
        """The leader's value, for which the others wait as long as it takes."""
        return value

    def same(self, what: str, value: object) -> None:
        """Raises RanksDiffer, naming `what` and the rank, where a rank has another value than the leader."""

    def same_weights(self, what: str, model: Learner) -> None:
        """The same of the weights that every rank holds and has stepped by itself."""

    def whole(self, model: Learner, make: Callable[[], Learner]) -> Learner | None:
        """The model with all its weights, to be looked at by the leader; None on the other ranks.

        make: builds a model of the same kind, where this one's weights are spread over the ranks.
        """
        return model


SOLO = Team()
"""The one process there is."""
