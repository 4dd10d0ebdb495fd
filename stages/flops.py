"""What a run costs in FLOPs, and so which of its freeze events are worth a cache. A model on paper, before anything is
measured: deterministic, alike on every machine, free of torch. Stands between FreezeOut's freeze events and the plan of
stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """From the start of `epoch`, counted from stage 0, the blocks before `cut` no longer learn."""

    epoch: int
    cut: int


@dataclass(frozen=True)
class Work:
    """The sizes that decide what an image costs. All results are FLOPs, a multiplication and its addition being two.

    A block over n tokens of width D takes 24 n D² for its matrices (4 D² weights in the attention, 8 D² in the MLP) and
    4 n² D for attention itself; the count is the usual one, for instance in Kaplan et al., arXiv 2001.08361, section
    2.1, with the attention term kept. Backward costs twice a forward. A step runs the blocks over the visible tokens
    and the decoder over what is decoded; encoding a cache runs its blocks over all tokens, group by group, of every
    view. Norms, softmax, reading and writing are left out.
    """

    depth: int
    width: int
    tokens: int
    visible: int
    """Tokens of an image that the encoder sees in a step."""
    groups: int
    patch_values: int
    decoded: int
    """Tokens that pass the decoder: the visible ones and the share of the hidden ones that is decoded."""
    decoder_depth: int
    decoder_width: int
    samples: int
    views: int
    images_per_epoch: int
    """Images trained on in an epoch; the incomplete last batch is dropped."""
    averaged: bool = False
    """Whether a moving average of the encoder teaches, which runs over all tokens from where the step begins."""

    @property
    def embedding(self) -> int:
        """Forward of the patch embedding, which always sees all tokens."""
        return 2 * self.tokens * self.patch_values * self.width

    @property
    def decoder(self) -> int:
        """Forward of the matching decoder: visible tokens in, its blocks, features and pixels of hidden ones out. Its
        last block computes only keys and values of the others.

        Other heads cost something else, but the same whichever freeze events get caches.
        """
        width, tokens, hidden = self.decoder_width, self.decoded, self.decoded - self.visible
        ends = self.visible * width + hidden * (width + self.patch_values)
        blocks = self.decoder_depth * block_flops(tokens, width)
        spared = (20 * width**2 + 4 * tokens * width) * self.visible if self.decoder_depth else 0
        return 2 * self.width * ends + blocks - spared

    def step(self, entry: int, cut: int) -> int:
        """One image of a training step that reads a cache at `entry` (0: images) while the blocks before `cut` are
        frozen: forward only from `entry` to `cut`, three times forward behind it. The patch embedding's backward has no
        input gradient, so it costs one forward."""
        frozen, learning = cut - entry, self.depth - cut
        inputs = 0 if entry else self.embedding * (1 if cut else 2)
        blocks = (frozen + 3 * learning) * block_flops(self.visible, self.width)
        return inputs + blocks + 3 * self.decoder + self.teacher(entry)

    def teacher(self, entry: int) -> int:
        """The moving average's forward for one image, from the blocks' input at `entry` (0: from the image), if one
        teaches."""
        if not self.averaged:
            return 0
        return (0 if entry else self.embedding) + (self.depth - entry) * block_flops(self.tokens, self.width)

    def prefix(self, cut: int, whole: bool) -> int:
        """What running the blocks before `cut` live, as a cache holds them, adds to a step for one image: over all
        groups, or the step's own."""
        groups = self.groups if whole else 1
        return self.embedding + cut * groups * block_flops(self.tokens // self.groups, self.width)

    def encode(self, parent: int, cut: int) -> int:
        """The cache at `cut`, all images and views, from the one at `parent` (0: from images)."""
        blocks = (cut - parent) * self.groups * block_flops(self.tokens // self.groups, self.width)
        return self.samples * self.views * (blocks + (0 if parent else self.embedding))

    def training(self, entry: int, stretches: Sequence[tuple[int, int]]) -> int:
        """Stretches of (epochs, cut), all fed by the cache at `entry`."""
        return self.images_per_epoch * sum(epochs * self.step(entry, cut) for epochs, cut in stretches)


def block_flops(tokens: int, width: int) -> int:
    """Forward of one transformer block over one image's tokens."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def choose_caches(work: Work, events: Sequence[Event], total_epochs: int) -> tuple[Event, ...]:
    """The events whose caches make the whole run cheapest: training and encoding, FLOPs by `work`.

    Exact: what follows a cache does not depend on what came before it, so the cheapest run up to an event is the
    cheapest over the cache before it (dynamic programming, O(m³) for m events). Among equals the one with fewer caches.
    """
    marks = [Event(0, 0), *events]
    best: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]  # up to a mark: FLOPs, caches, which marks
    for mark in range(1, len(marks) + 1):
        ways = []
        for before in range(mark):
            flops, caches, chosen = best[before]
            flops += work.training(marks[before].cut, _stretches(marks[before:mark], marks[mark:], total_epochs))
            if mark < len(marks):
                flops += work.encode(marks[before].cut, marks[mark].cut)
                chosen, caches = (*chosen, mark), caches + 1
            ways.append((flops, caches, chosen))
        best.append(min(ways))
    return tuple(marks[mark] for mark in best[-1][2])


def run_flops(work: Work, events: Sequence[Event], cached: Sequence[Event], total_epochs: int) -> int:
    """Training and encoding of a whole run: the events in `cached` get caches, the others freeze in place."""
    total, entry, marks = 0, 0, [Event(0, 0), *events]
    for place, mark in enumerate(marks):
        if mark in cached:
            total, entry = total + work.encode(entry, mark.cut), mark.cut
        total += work.training(entry, _stretches([mark], marks[place + 1 :], total_epochs))
    return total


def _stretches(marks: Sequence[Event], later: Sequence[Event], total_epochs: int) -> list[tuple[int, int]]:
    """(epochs, cut) from each mark to the next, the last one to the first of `later` or the end."""
    ends = [*(mark.epoch for mark in marks[1:]), later[0].epoch if later else total_epochs]
    return [(end - mark.epoch, mark.cut) for mark, end in zip(marks, ends, strict=True)]
