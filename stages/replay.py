"""The order that was trained on: what a step has read, a digest that a segment's accounts keep of every epoch, and the
same computed again from what a record says was asked for. The first comes from the loader's own rows and the cache that
it had open, the second from settings alone, so that comparing them shows whether training read what it should. Free of
torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache.order import Blocks, batch_rows


@dataclass(frozen=True)
class Reading:
    """What a step has read."""

    view: int
    group: int
    samples: int
    """Rows that there are to read."""
    digest: str
    """Of view, group and rows, those of all ranks."""
    generation: int = 0
    """How often the cache's ring of views had turned."""


def reading(rows_B: np.ndarray, view: int, group: int, samples: int, generation: int = 0) -> Reading:
    """What a step reads that takes these rows (B,), of all ranks, of a view and a token group."""
    named = f"{view} {group} ".encode() + np.ascontiguousarray(rows_B, "<i8").tobytes()
    return Reading(view, group, samples, hashlib.sha256(named).hexdigest(), generation)


def chained(before: str, digest: str) -> str:
    """The digest of an order that goes on by one step."""
    return hashlib.sha256((before + digest).encode()).hexdigest()


def note(epochs: list[dict[str, Any]], epoch: int, place: int, read: Reading) -> None:
    """Add a step, counted within its epoch, to the epochs that were trained on.

    `first` is the step at which the account of an epoch begins: 0, unless an older version trained those before.
    """
    if not epochs or epochs[-1]["epoch"] != epoch:
        what = {"view": read.view, "group": read.group, "generation": read.generation, "samples": read.samples}
        epochs.append({"epoch": epoch, **what, "first": place, "steps": 0, "order": ""})
    epochs[-1]["steps"] += 1
    epochs[-1]["order"] = chained(epochs[-1]["order"], read.digest)


@dataclass(frozen=True)
class Replay:
    """What a stage or an arm is asked to read, by the inputs in its record."""

    seed: int
    batch_size: int
    first_epoch: int
    views: int
    """0 where every epoch has a view of its own."""
    groups: int
    refresh: int
    """Epochs after which the ring of views turns; 0 where it does not."""
    blocks: Blocks | None

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Replay:
        """From the `inputs` of a record. An arm reads a fresh view in every epoch, and so does stage 0."""
        segments = inputs.get("schedule.stage") or inputs["schedule.stages"]
        views = inputs.get("cache.views", 0)
        by_shards = inputs.get("cache.shuffle") == "blocks"
        return cls(
            seed=inputs["seed"],
            batch_size=inputs["train.batch_size"],
            first_epoch=segments[0]["first_epoch"],
            views=views,
            groups=inputs["mask.groups"] if views else 1,
            refresh=inputs.get("cache.refresh", 0),
            blocks=Blocks(inputs["cache.shard_rows"], inputs["cache.shuffle_shards"]) if by_shards else None,
        )

    def place(self, epoch: int) -> tuple[int, int, int]:
        """(view, group, generation) of an epoch, counted from stage 0."""
        if not self.views:
            return epoch, 0, 0
        generation = (epoch - self.first_epoch) // self.refresh if self.refresh else 0
        # A ring that has turned g times holds views g .. g + V - 1, and an epoch takes that of its own remainder.
        view = generation + (epoch - generation) % self.views
        return view, epoch // self.views % self.groups, generation

    def rows(self, epoch: int, step: int, samples: int) -> np.ndarray:
        """(B,) rows of a step of an epoch."""
        return batch_rows(self.seed, epoch, step, samples, self.batch_size, self.blocks)

    def epoch(self, noted: Mapping[str, Any]) -> dict[str, Any]:
        """The account of an epoch as it should be, over the steps that were noted."""
        epoch, samples = noted["epoch"], noted["samples"]
        view, group, generation = self.place(epoch)
        found: list[dict[str, Any]] = []
        for step in range(noted["first"], noted["first"] + noted["steps"]):
            note(found, epoch, step, reading(self.rows(epoch, step, samples), view, group, samples, generation))
        return found[0]
