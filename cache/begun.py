"""How far the build of a cache is, or will be without computing anything: for asking the disk for what is still to be
written and no more. By receipts and by a donor's manifest; nothing is hashed, as the build does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache.adopt import find_donor
from cache.layout import Layout
from cache.place import matching
from cache.receipts import RECEIPTS, read_receipt, receipt_name
from cache.size import part_bytes


@dataclass(frozen=True)
class Begun:
    """Bytes of an unfinished cache that will not be written any more."""

    linked: int
    """Files of a finished cache beside it, which have a second name here, or will have."""
    written: int
    """What lies here besides."""


def begun(
    folder: Path, layout: Layout, kin: str, labels: np.ndarray, keys: Sequence[str], digests: np.ndarray
) -> Begun:
    """How far a cache is of which `find_donor` may know a donor, for the same samples."""
    donor = find_donor(folder, layout, kin, labels, keys, digests)
    there = {path.stem for path in matching(folder / RECEIPTS, "*.json")}
    # Of the views that anything is known of only: what does not fit may have more shards than memory holds.
    views = {int(name.removeprefix("view_").partition("-")[0]) for name in there if name.startswith("view_")}
    if donor:
        had = donor.layout.spec
        slots = (layout.spec.slot_of(had.view_at(slot)) for slot in range(had.views))
        views |= {slot for slot in slots if slot is not None}
    shards = [shard for view in sorted(views) for shard in layout.shards_of(view)]
    linked = {shard for shard in shards if donor and donor.twin(layout, shard)}
    noted = ((shard, receipt_name(shard)) for shard in shards if shard not in linked)
    written = [shard for shard, name in noted if name in there and read_receipt(folder, layout, name)]
    return Begun(part_bytes(layout, linked), part_bytes(layout, written))
