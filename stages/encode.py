"""Run the frozen blocks once: images, or the cache of an earlier cut, become the cache of this cut. One task makes one
shard of one view, wherever it runs, and leaves a receipt; a build goes on at the first shard without one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from operator import attrgetter
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache.adopt import Donor, Taken, find_donor
from cache.backends import close_shared, shared_reader
from cache.errors import DamagedCache, MissingCache, StaleCache
from cache.layout import Layout, Shard, Stored
from cache.loader import prefetch
from cache.manifest import CacheManifest, read_manifest
from cache.place import place_of
from cache.reader import MEMORY
from cache.receipts import renew
from cache.rounding import Moments, Rounded, moments, relative_rmse, room
from cache.size import check_space
from cache.writer import (
    NO_LIMIT,
    ChainError,
    ErrorLimit,
    RowBlock,
    create_store,
    finish,
    finished,
    missing_shards,
    stored_rows,
    write_rows,
    write_stored,
)
from models.config import ModelConfig
from models.masking import take_tokens
from models.targets import patchify
from models.vit import Encoder, build_encoder
from stages.augment import augmenter
from stages.carried import frozen_state
from stages.config import DataConfig
from stages.device import autocast
from stages.images import ImageList, open_data, spread
from stages.views import image_batch, token_orders


@dataclass(frozen=True)
class EncodeJob:
    """All that a worker needs to make any shard of one cache; small, and picklable."""

    folder: str
    layout: Layout
    weights: str
    """model.safetensors of the stage whose blocks are frozen."""
    model: ModelConfig
    data: DataConfig
    index_folder: str
    parent: str | None
    """Folder of the cache that this one continues; None starts from images."""
    parent_cut: int
    batch: int
    device: str
    threads: int
    """Torch threads of a worker."""
    loader_threads: int
    rand_augment: float = 0.0
    """Magnitude of RandAugment on every view; the spec's view transform names it."""
    limit: ErrorLimit = NO_LIMIT
    """What the cache may lose."""
    together: bool = False
    """Whether two tasks of a worker run the frozen blocks at once, each with half of its threads: 1.2 times as fast on
    two cores, since none waits for another that writes. Otherwise, on a GPU or beside training, one at a time."""
    memory: int = MEMORY
    """Bytes of the parent, and of a cache that rows are taken over from, that each reader may map."""

    @property
    def task_threads(self) -> int:
        """Torch threads of one task."""
        return -(-self.threads // 2) if self.together else self.threads


RunTasks = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def build(
    job: EncodeJob,
    images: ImageList,
    run: RunTasks,
    tell: Callable[[str], None] = lambda line: None,
    took: Callable[[Donor, int], None] = lambda donor, rows: None,
) -> Iterator[tuple[int, int]]:
    """Build what is missing of a cache; yields (shards done, shards in all) after each. Raises CacheError.

    What a finished cache beside it has of the same samples and views is taken over, and told: `took` hears of the donor
    before anything is, with 0 rows, and of how many rows (of one view each) once they are. `run` maps `encode_shard`
    over tasks anywhere and yields as they are done. What is made stays when the caller stops. The caller holds the
    cache (cache.lock), the workers do not.
    """
    folder, layout = place_of(job.folder), job.layout
    parent = parent_of(job)
    parent_kin = parent.kin if parent else ""
    continues = parent if parent and not finished(folder, layout) else None
    if continues and renew(folder, continues):
        tell(f"{job.parent} was changed since this cache was begun: it is begun again")
    create_store(folder, layout, images.labels, images.keys, images.digests)
    chain_error = measure_chain(job, images, run, tell) if continues else None
    donor = None
    if missing := missing_shards(folder, layout, run):
        kin = layout.spec.kin(parent_kin)
        donor = find_donor(folder, layout, kin, images.labels, images.keys, images.digests, job.memory)
    if donor:
        took(donor, 0)
        wanted, missing = missing, [shard for shard in missing if not donor.link(folder, layout, shard)]
        took(donor, sum(shard.rows for shard in wanted) - sum(shard.rows for shard in missing))
    check_space(folder, layout, missing)  # what is linked takes no room

    def taken(shard: Shard) -> Taken | None:
        return donor.taken(layout, shard) if donor else None

    if donor:
        new = sum(shard.rows if (old := taken(shard)) is None else len(old.new) for shard in missing)
        total = layout.num_samples * layout.spec.views
        tell(f"{total - new} of {total} rows are taken over from {donor.folder} or there already, {new} are computed")
    done = len(layout.shards) - len(missing)
    if donor and done:
        yield done, len(layout.shards)
    try:
        for shard in run(encode_shard, ((job, shard, taken(shard)) for shard in missing)):  # few are there at a time
            done += 1
            if donor and (old := taken(shard)):
                took(donor, len(old.places))
            yield done, len(layout.shards)
    finally:
        close_shared()
    if not finished(folder, layout):  # another version's manifest may lie there, too
        check_inputs(job, images, parent)
    finish(folder, layout, job.limit, parent_kin, chain_error)


def parent_of(job: EncodeJob) -> CacheManifest | None:
    """The cache that a job continues, as it is now."""
    return read_manifest(job.parent) if job.parent else None


CHAIN_SAMPLES = 8
"""Samples on which a cache that continues another is compared with the images: their forward costs a moment, and of
each there are all tokens of all views."""


def measure_chain(job: EncodeJob, images: ImageList, run: RunTasks, tell: Callable[[str], None]) -> ChainError:
    """How far a cache that continues another will be from what the frozen blocks make of the images: blocks may amplify
    what the caches before it have lost, so that no sum of what each loses tells. TooCoarse where it is too far, before
    anything is encoded. The views travel with the tasks: workers need not see the images."""
    spec, rows = job.layout.spec, spread(len(images), CHAIN_SAMPLES)
    slots = range(spec.views)
    tasks = ((job, slot, rows, from_images(job, spec.view_at(slot), images)(rows)) for slot in slots)
    try:
        found = ChainError(float(np.max(list(run(view_error, tasks)))), len(rows))
    finally:
        close_shared()
    job.limit.check_chain(found, spec)
    told = f"relative RMSE against the images {found.relative_rmse:.2e}"
    tell(f"cut {spec.cut}, built from the cache of cut {job.parent_cut}: {told}, of {found.samples} samples")
    return found


def view_error(task: tuple[EncodeJob, int, np.ndarray, Part]) -> float:
    """The same of one view, whose images are given: what would be stored of it against what would be given to store."""
    job, slot, rows, part = task
    torch.set_num_threads(job.task_threads)
    live = replace(job, parent=None, batch=len(rows))
    given_NLD = encode_rows(live, slot, rows, lambda rows: part).features_NLD.copy()
    stored = stored_rows(job.layout, slot, encode_rows(job, slot, rows), slice(len(rows)))
    rounded = Rounded(stored["features"], stored.get("scale"))
    total = Moments.join(moments(given_NLD, rounded, job.layout.spec.codec))
    return relative_rmse(total.error_squares, total.given_squares)


def check_inputs(job: EncodeJob, images: ImageList, parent: CacheManifest | None) -> None:
    """Whether a cache was made of what its spec names, from the first shard to the last: StaleCache, naming what was
    changed in the meantime. Images are also compared with their hashes whenever one is read."""
    spec = job.layout.spec
    frozen_state(job.weights, spec.cut, spec.weights)
    if parent is not None:
        assert job.parent is not None
        if read_manifest(job.parent) != parent:
            raise StaleCache(f"{job.parent} was built anew while it was read; run again, which builds from what it is")
        return
    found = open_data(job.data, Path(job.index_folder)).train
    if found.digest != spec.data:
        changed, how = what_changed(found, images)
        raise StaleCache(
            f"{changed} in {job.data.source} was {how} while the cache was built; undo that, or run again, which takes "
            "the images as they are now"
        )


def what_changed(now: ImageList, then: ImageList) -> tuple[str, str]:
    """The key of an image by which two lists of other digests differ, and what became of it: of its content before its
    label, which a new class may give to all, and of both before its place."""
    for how, value in (("changed", attrgetter("sha256")), ("relabelled", attrgetter("label"))):
        new, old = ({entry.key: value(entry) for entry in listed.entries} for listed in (now, then))
        if changed := [key for key in new.keys() | old.keys() if new.get(key) != old.get(key)]:
            key = min(changed)
            return key, how if key in new and key in old else "added" if key in new else "removed"
    places = zip(now.keys, then.keys, strict=True)
    return next(key for key, before in places if key != before), "put elsewhere in the order"


@dataclass(frozen=True)
class Part:
    """Some rows of a shard: what the frozen blocks take, images (B, 3, S, S) or the parent's features (B, L, D), and
    what is stored beside their output."""

    inputs: Tensor
    crop_B5: np.ndarray
    keys: tuple[str, ...]
    token_ids_BL: np.ndarray | None
    pixels_BLP: np.ndarray | None
    prefix_BSD: Tensor | None = None
    """The parent's prefix, where the model has one."""


@lru_cache(maxsize=2)
def frozen_encoder(weights: str, weights_hash: str, cut: int, model: ModelConfig, device: str) -> Encoder:
    """The encoder that a cache is made with, built once per worker. Raises WeightsUnseen when its weights are
    not there, or differ."""
    encoder = build_encoder(model, seed=0)
    found = encoder.vit.load_state_dict(frozen_state(weights, cut, weights_hash), strict=False)
    assert not found.unexpected_keys, "a file of weights of this model, with all that is frozen: their hash says so"
    encoder.set_attention(device)
    return encoder.to(device).eval()


@lru_cache(maxsize=2)
def training_images(data: DataConfig, index_folder: str, digest: str) -> ImageList:
    """The training images, opened once per worker. Raises StaleCache when they are not those that are wanted."""
    folder = Path(index_folder)
    images = open_data(data, folder if folder.parent.is_dir() else None).train  # a worker may not see the run's folder
    if images.digest != digest:
        raise StaleCache(
            f"{data.source} holds data={images.digest[:8]}…, the cache wants data={digest[:8]}…: images were changed "
            "while it was built; run again"
        )
    return images


SETUP, FORWARD = Lock(), Lock()
"""One thread of a process at a time makes what all share, and one runs the frozen blocks unless it is `together`."""


Load = Callable[[np.ndarray], Part]


def encode_shard(task: tuple[EncodeJob, Shard, Taken | None], load: Load | None = None) -> Shard:
    """Compute and write one shard of one view: a pure function of its task, so it can run anywhere, and twice.
    `load` is for whoever has at hand what the frozen blocks take of some rows.

    Two threads of a process are enough to keep it at the frozen blocks: while one runs them, the other writes the shard
    before, then loads the first batches of the shard after, or runs them too. No more than two shards are in memory.
    """
    job, shard, taken = task
    torch.set_num_threads(job.task_threads)
    folder, layout = place_of(job.folder), job.layout
    rows = np.arange(shard.first_row, shard.first_row + shard.rows)
    if taken is None:
        made = encode_rows(job, shard.view, rows, load)
        write_rows(folder, layout, shard.view, shard.first_row, made, job.limit, job.batch)
        return shard
    try:
        stored, old = taken.stored(layout), {int(place): number for number, place in enumerate(taken.places)}
        names = dict(zip(taken.places.tolist(), taken.keys, strict=True))
    except (DamagedCache, MissingCache):  # `gc` may have removed it since
        return encode_shard((job, shard, None))
    new = {int(place): number for number, place in enumerate(taken.new)}
    block = encode_rows(job, shard.view, rows[taken.new]) if new else None

    def row(place: int) -> Stored:
        if block is None or place in old:
            return {name: values[old[place]][None] for name, values in stored.items()}
        return stored_rows(layout, shard.view, block, slice(new[place], new[place] + 1))

    names |= dict(zip(taken.new.tolist(), block.keys, strict=True)) if block else {}
    keys = [names[place] for place in range(len(rows))]
    # Rows of two makings: no one batch, from the shard's first row on, gives the bits of all.
    write_stored(folder, layout, shard, map(row, range(len(rows))), keys, job.limit, batch=0)
    return shard


def encode_rows(job: EncodeJob, view: int, rows: np.ndarray, load: Load | None = None) -> RowBlock:
    """What the frozen blocks give for some rows of a view, and what is stored beside it. Features and pixels lie in
    memory of the calling thread, which its next call uses again."""
    spec = job.layout.spec
    with SETUP:
        encoder = frozen_encoder(job.weights, spec.weights, spec.cut, job.model, job.device)
        load = load or loader(job, view)
    batches = [rows[start : start + job.batch] for start in range(0, len(rows), job.batch)]
    features_NLD = room("encoded", (len(rows), spec.num_tokens, spec.width))
    values = 3 * spec.patch_size**2 if spec.pixels else 0
    pixels_NLP = room("pixels", (len(rows), spec.num_tokens, values), torch.uint8)
    room_by_batch, beside = (features_NLD.split(job.batch), pixels_NLP.split(job.batch)), []
    turn = nullcontext() if job.together else FORWARD
    with prefetch(load, batches, job.loader_threads, 2) as loaded, turn, torch.inference_mode():
        for part, into, pixels in zip(loaded, *room_by_batch, strict=True):
            with autocast(job.device, spec.dtype):
                features_BLD, prefix_BSD = frozen_forward(encoder, job, part)
            assert features_BLD.shape == into.shape, "or copying would repeat what is too small"
            into.copy_(features_BLD)
            if spec.pixels:
                assert part.pixels_BLP is not None and part.pixels_BLP.shape == pixels.shape, "or old ones would stay"
                pixels.copy_(torch.from_numpy(part.pixels_BLP))
            prefix = prefix_BSD.float().cpu().numpy() if prefix_BSD.shape[1] else None
            beside.append((part.crop_B5, part.keys, part.token_ids_BL, prefix))
    crops, keys, *parts = zip(*beside, strict=True)
    token_ids, prefixes = (None if of_part[0] is None else np.concatenate(of_part) for of_part in parts)
    return RowBlock(
        features_NLD.numpy(),
        np.concatenate(crops),
        tuple(chain.from_iterable(keys)),
        token_ids,
        pixels_NLP.numpy() if spec.pixels else None,
        prefixes,
    )


def frozen_forward(encoder: Encoder, job: EncodeJob, part: Part) -> tuple[Tensor, Tensor]:
    """The features of some rows at the cut, (B, L, D) in stored order, and the prefix of every group, (B, S, D)."""
    spec, inputs = job.layout.spec, part.inputs.to(job.device)
    prefix = encoder.prefix(len(inputs)).repeat(1, spec.groups, 1)
    if job.parent:
        prefix = prefix if part.prefix_BSD is None else part.prefix_BSD.to(job.device)
        return encoder.run_groups(inputs, prefix, spec.groups, job.parent_cut, spec.cut)
    tokens = encoder.embed(encoder.normalized(inputs))
    if part.token_ids_BL is not None:
        tokens = take_tokens(tokens, torch.from_numpy(part.token_ids_BL).to(tokens.device))
    return encoder.run_groups(tokens, prefix, spec.groups, 0, spec.cut)


def loader(job: EncodeJob, view: int) -> Load:
    """What loads rows of a view for the frozen blocks."""
    return from_cache(job, view) if job.parent else from_images(job, job.layout.spec.view_at(view))


def from_images(job: EncodeJob, view: int, images: ImageList | None = None) -> Load:
    """A function that cuts a view of some rows, of images that are at hand or are opened."""
    spec, size = job.layout.spec, job.model.image_size
    images = training_images(job.data, job.index_folder, spec.data) if images is None else images
    augment = augmenter(job.rand_augment, spec.seed)

    def load(rows: np.ndarray) -> Part:
        keys = tuple(images.keys[row] for row in rows)
        cut, crops = image_batch(images, rows, view, job.data, size, spec.seed, augment)
        tensor = torch.from_numpy(cut)
        orders = (
            token_orders(spec.seed, view, keys, spec.num_tokens, spec.groups, spec.mask_block)
            if spec.groups > 1
            else None
        )
        pixels = patchify(tensor, spec.patch_size).numpy() if spec.pixels else None
        return Part(tensor, crops, keys, orders, pixels)

    return load


def from_cache(job: EncodeJob, view: int) -> Load:
    """A function that reads some rows of the parent cache, and all else that the new shard takes over."""
    assert job.parent is not None
    parent, spec = shared_reader(job.parent, job.memory), job.layout.spec
    assert parent.manifest.fingerprint == spec.parent, "the spec names the cache that it continues"

    def load(rows: np.ndarray) -> Part:
        batch = parent.read(rows, view)
        orders = batch.ids_BL.numpy() if spec.groups > 1 else None
        pixels = None if batch.pixels_BLP is None else batch.pixels_BLP.numpy()
        return Part(batch.features_BLD, parent.crops(rows, view), batch.keys, orders, pixels, batch.prefix_BSD)

    return load
