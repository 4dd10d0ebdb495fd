"""A cache that stages need, before it is known whether it is there: what it holds, whose weights made it, and which
cache it continues. A stage needs the features that it learns from and, where a frozen teacher gives the targets, the
teacher's; fine-tuning behind frozen blocks needs their output. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from cache.codecs import parse_filter
from cache.config import CacheConfig
from cache.layout import Layout
from models.spec import FeatureSpec


@dataclass(frozen=True)
class Need:
    """A cache, and where the weights of its frozen blocks come from."""

    name: str
    """How verdicts and messages call it."""
    after: int
    """The stage whose encoder, as that stage leaves it, makes it."""
    draft: FeatureSpec
    """Its identity as far as it is known before anything is trained: weights and parent are open."""
    parent: Need | None = None
    """The cache that it continues; None where it is made from images."""
    arm: str = ""
    """The arm whose encoder makes it, where it is not a stage's."""
    rand_augment: float = 0.0
    """Magnitude of RandAugment on its views."""
    tunes: bool = False
    """Whether fine-tuning reads it, not a stage."""
    reader: int = 0
    """The first stage that reads it, where that is not the one after `after`."""

    @property
    def maker(self) -> str:
        """Whose encoder makes it, in words."""
        return f"arm {self.arm}" if self.arm else f"stage {self.after}"

    @property
    def tag(self) -> dict[str, str | int]:
        """How events name what it is built for."""
        return {"arm": "finetune"} if self.tunes else {"stage": self.stage}

    @property
    def stage(self) -> int:
        """The first stage that reads it; what it costs to build is counted there."""
        return self.reader or self.after + 1

    @property
    def start(self) -> int:
        """The block from which it is computed."""
        return self.parent.draft.cut if self.parent else 0

    def layout(self, num_samples: int, cache: CacheConfig) -> Layout:
        """How it lies on disk."""
        return Layout(
            self.draft, num_samples, cache.shard_rows, cache.backend, parse_filter(cache.filter).compression
        )
