"""A finished cache whose files were damaged becomes whole in place: only what is bad is computed again, as the cache is
laid out and in the batches it was computed in, whatever the settings say today, and its manifest stays where it is
until then. Beside `encode`, which builds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from cache.backends import close_shared, files_of
from cache.checksum import checksum
from cache.errors import StaleCache
from cache.layout import Shard
from cache.manifest import ShardEntry, atomic_write, check_spec, read_manifest
from cache.place import is_there, place_of
from cache.receipts import RECEIPTS, STORE_RECEIPT, write_receipt
from cache.verify import Damage
from cache.writer import amend, drop_receipts
from stages.encode import EncodeJob, RunTasks, check_inputs, encode_shard, parent_of
from stages.images import ImageList


def mend(
    job: EncodeJob,
    images: ImageList,
    damages: Sequence[Damage],
    run: RunTasks,
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[int, int]]:
    """Compute the damaged shards of a finished cache again; yields (shards done, shards in all) after each, and tells
    where that gave other bits. Raises CacheError. The caller holds the cache. Stopped anywhere, what is still damaged
    is found damaged again."""
    folder = place_of(job.folder)
    manifest, parent = read_manifest(folder), parent_of(job)
    check_spec(manifest, job.layout.spec)
    drop_receipts(folder)
    layout, bad = manifest.layout, {damage.file for damage in damages}
    static = files_of(layout.backend).static_files(layout, images.labels, images.keys, images.digests)
    without_rows = bad & {entry.name for entry in manifest.shards if not entry.rows}
    if gone := without_rows - static.keys():
        raise StaleCache(
            f"this version no longer writes {folder / min(gone)}; remove {folder}, and build the cache again"
        )
    for name in without_rows:
        atomic_write(folder / name, static[name])
    # Another version of a library may have written them otherwise: the manifest has to say what they are now.
    again = [ShardEntry(name, 0, 0, len(static[name]), checksum(static[name])) for name in sorted(without_rows)]
    write_receipt(folder, layout, STORE_RECEIPT, again)
    batch_of = {entry.name: entry.batch for entry in manifest.shards if entry.batch}
    tasks: list[tuple[EncodeJob, Shard, None]] = []
    for shard in layout.shards:
        first, *others = layout.files(shard)
        if not bad.isdisjoint((first, *others)):
            tasks.append((replace(job, layout=layout, batch=batch_of.get(first, job.batch)), shard, None))
    try:
        for count, _ in enumerate(run(encode_shard, tasks), start=1):
            yield count, len(tasks)
    finally:
        close_shared()
    check_inputs(job, images, parent)
    if not amend(folder, job.limit):
        tell(
            f"{folder}: what was mended is not to the bit what was there: features may differ in last bits, as in "
            "other batches or on another processor; the manifest says what they are now"
        )
    assert not is_there(folder / RECEIPTS)
