"""Receipts of a build in progress: one small file per shard, written once the shard is durable, by which a build that
was stopped anywhere knows what it has. They go when the manifest, which then says the same, is written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cache.layout import Layout, Shard
from cache.manifest import (
    FORMAT,
    READ_FORMATS,
    CacheManifest,
    ShardEntry,
    atomic_write,
    entries_from_dicts,
    seal,
    unseal,
)
from cache.place import StoreUnreachable, forget, is_there, read_bytes
from models.spec import digest

RECEIPTS = "receipts"
STORE_RECEIPT = "store"


def receipt_name(shard: Shard) -> str:
    return f"view_{shard.view}-{shard.first_row:09d}"


def write_receipt(folder: Path, layout: Layout, name: str, entries: Iterable[ShardEntry]) -> None:
    """Notes that the files of `entries` are durably written."""
    atomic_write(folder / RECEIPTS / f"{name}.json", sealed_receipt(layout, entries))


def sealed_receipt(layout: Layout, entries: Iterable[ShardEntry]) -> bytes:
    """The content of a receipt."""
    return seal({"format": FORMAT, **_identity(layout), "entries": [dict(vars(entry)) for entry in entries]})


def read_receipt(folder: Path, layout: Layout, name: str) -> tuple[ShardEntry, ...] | None:
    """Entries of a receipt; None when there is none, or it is not whole, or another layout's. StoreUnreachable."""
    try:
        values = unseal(read_bytes(folder / RECEIPTS / f"{name}.json"))
    except StoreUnreachable:  # or its shard would be made again
        raise
    except (OSError, ValueError):
        return None
    entries, version = values.pop("entries"), values.pop("format")
    return entries_from_dicts(entries) if version in READ_FORMATS and values == _identity(layout) else None


def renew(folder: Path, parent: CacheManifest) -> bool:
    """Forgets the receipts of what was made of other bits than the parent has now, which a repair may give it under the
    same fingerprint, and notes what they are; whether there were any. What a version began that noted nothing stays."""
    now = seal({"parent": digest({entry.name: entry.checksum for entry in parent.shards if entry.rows})})
    note = folder / RECEIPTS / "parent.json"
    if other := is_there(note) and read_bytes(note) != now:
        forget(folder / RECEIPTS)
    atomic_write(note, now)
    return other


def _identity(layout: Layout) -> dict[str, Any]:
    """What a receipt is good for: another shard size, backend or compression makes other files of the same numbers."""
    return {
        "fingerprint": layout.spec.fingerprint,
        "num_samples": layout.num_samples,
        "shard_rows": layout.shard_rows,
        "backend": layout.backend,
        "compression": layout.compression,
    }
