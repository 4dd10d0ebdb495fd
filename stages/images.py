"""Images as training meets them, whatever they lie in: a fixed list of samples with keys, labels and a digest over
their contents. The first thing in the data path. Every image is read, hashed and decoded once before training, so that
nothing that is no image is met in the middle of a night. Free of torch, unless a torchvision data set is read."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np
from PIL import Image

from cache.errors import CacheError
from cache.place import path_or_url
from models.spec import digest
from stages import remote
from stages.config import DataConfig
from stages.copies import Copies
from stages.errors import DataError
from stages.index import Entry, Index, content_hash, indexed

SAMPLE = Path(__file__).resolve().parent.parent / "data" / "sample"
HELD_OUT = 10
"""One image in so many is held out where no evaluation set is named."""


@dataclass(frozen=True)
class ImageList:
    """Samples in a fixed order."""

    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    """Names of the labels where the source has names; else empty."""
    skipped: tuple[tuple[str, str], ...]
    """(file, reason) of what was left out."""
    read: Callable[[Entry], bytes | Image.Image]
    index_file: Path | None = None
    """Where the list is kept for the next run, if anywhere."""

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        return tuple(entry.key for entry in self.entries)

    @cached_property
    def labels(self) -> np.ndarray:
        """(N,) int64, -1 where unknown."""
        return np.array([entry.label for entry in self.entries], np.int64)

    @cached_property
    def digests(self) -> np.ndarray:
        """(N, 32) uint8: sha256 of every image's content."""
        content = b"".join(bytes.fromhex(entry.sha256) for entry in self.entries)
        return np.frombuffer(content, np.uint8).reshape(len(self), 32)

    @cached_property
    def digest(self) -> str:
        """sha256 over keys, labels and contents, in order; where the files lie does not matter."""
        return digest([[entry.key, entry.label, entry.sha256] for entry in self.entries])

    def image(self, row: int) -> Image.Image:
        """The decoded RGB image of a row. Raises DataError when it can no longer be read, or is no longer the one that
        was hashed: what is trained on is what the digest says. Hashing takes some 2 % of the time of decoding."""
        entry = self.entries[row]
        return self._decoded(entry, lambda: self.read(entry))

    def several(self, rows: Sequence[int] | np.ndarray) -> Iterator[Image.Image]:
        """The same of some rows in their order, one by one; what lies behind URLs is read many at a time."""
        if not isinstance(self.read, remote.Reader):
            yield from (self.image(int(row)) for row in rows)
            return
        entries = [self.entries[int(row)] for row in rows]
        contents = self.read.several(entries)
        for entry in entries:
            yield self._decoded(entry, lambda: next(contents))

    def only(self, rows: Sequence[int] | np.ndarray) -> ImageList:
        """The list of some rows."""
        return replace(self, entries=tuple(self.entries[row] for row in rows))

    def _decoded(self, entry: Entry, read: Callable[[], bytes | Image.Image]) -> Image.Image:
        """What was read of an entry, compared with its hash and decoded."""
        try:
            content = read()
            if entry.sha256 and content_hash(content) != entry.sha256:
                self._forget()
                raise DataError(
                    f"{entry.key} in {entry.file} was changed since the images were listed; restore it, or run again, "
                    "which takes it as it is now"
                )
            found = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
            return found.convert("RGB")
        except (DataError, CacheError):  # of a store that does not answer, nothing is known
            raise
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"{entry.key} in {entry.file} can no longer be read ({error}); restore it and run again"
            ) from error

    def _forget(self) -> None:
        """Let the next run list the images anew, also where no stamp tells that one has changed: a store may keep none,
        another decoder may give other pixels of a torchvision data set."""
        if self.index_file:
            with suppress(OSError):
                self.index_file.unlink(missing_ok=True)


@dataclass(frozen=True)
class Data:
    """What is trained on and what is evaluated on."""

    train: ImageList
    val: ImageList
    twins: tuple[tuple[str, str], ...] = ()
    """(evaluation image, training image of the same content), by key: what is not evaluated on for that reason."""


def open_data(config: DataConfig, index_folder: Path | None = None) -> Data:
    """Training and evaluation images. Without `val_source` the sample has its own, and other sources a fixed tenth.
    No content is on both sides, whatever the limit.

    Raises DataError.
    """
    train = open_images(config.source, config.on_bad, _index_file(index_folder, "train"), config.cache_gb)
    val_source = config.val_source or ("sample:val" if config.has_own_val else "")
    if val_source:
        found = open_images(val_source, config.on_bad, _index_file(index_folder, "val"), config.cache_gb)
        _refuse_two_numberings({config.source: train, val_source: found})
        val = _with_labels_of(train, found, val_source)
    else:
        held = np.array([_is_held_out(key) for key in train.keys])
        train, val = train.only(np.flatnonzero(~held)), train.only(np.flatnonzero(held))
        if not len(train) or not len(val):
            raise DataError(
                f"{config.source} has {len(held)} images, too few to hold out a tenth; name an evaluation set with "
                "data.val_source (DATA_VAL)"
            )
    return _apart(config, train, val)


def _apart(config: DataConfig, train: ImageList, val: ImageList) -> Data:
    """Both sides, the limit applied, without the evaluation images that are training images, too. DataError where a
    named evaluation set has some and may not be cut, or nothing is left."""
    twins = _twins(train, val)
    if twins and config.val_source and config.on_bad == "stop":
        row, key = next(iter(twins.items()))
        raise DataError(
            f"{len(twins)} of {len(val)} images of {config.val_source} are training images, too, first "
            f"{val.keys[row]}, the same as {key} in {config.source}; leave them out of one (DATA, DATA_VAL), or out of "
            "the evaluation with data.on_bad=skip"
        )
    if len(twins) == len(val):
        raise DataError(
            f"all {len(val)} images to evaluate on are training images of {config.source}, too, first {val.keys[0]}; "
            "name others with data.val_source (DATA_VAL)"
        )
    told = tuple((val.keys[row], key) for row, key in twins.items())
    apart = val.only([row for row in range(len(val)) if row not in twins]) if twins else val
    return Data(train.only(spread_by_class(train.labels, config.limit)), apart, told)


def _twins(train: ImageList, val: ImageList) -> dict[int, str]:
    """The rows of evaluation images whose content a training image has, too, with the key of the first such."""
    keys = {entry.sha256: entry.key for entry in reversed(train.entries)}
    return {row: keys[entry.sha256] for row, entry in enumerate(val.entries) if entry.sha256 in keys}


def open_images(
    source: str, on_bad: str = "stop", index_file: Path | None = None, cache_gb: float = 10.0
) -> ImageList:
    """The images of a source: `sample`, a folder, tars by path, glob or braces, at a URL, too, or a torchvision data
    set's name. Of images behind a URL copies of up to `cache_gb` are kept beside `index_file`.

    Raises DataError naming what is wrong, where, and what to do; StoreUnreachable.
    """
    if source in ("sample", "sample:val"):
        source = str(SAMPLE / ("val-*.tar" if source.endswith(":val") else "train-*.tar"))
    read: Callable[[Entry], bytes | Image.Image]
    source = path_or_url(source)
    if "://" in source:
        copies = Copies(index_file.parent / "copies", int(cache_gb * 1e9)) if index_file and cache_gb else None
        index, read = remote.indexed(source, on_bad, index_file, copies)
    else:
        index, read = indexed(source, on_bad, index_file)
    if not index.entries:
        raise DataError(f"{source} has no images; give a folder of images, tars with <key>.png, or a torchvision name")
    _refuse_duplicates(source, index)
    return ImageList(index.entries, index.classes, index.skipped, read, index_file)


def spread(count: int, limit: int) -> np.ndarray:
    """`limit` rows evenly spread over `count`, so that a list sorted by class keeps all classes; 0 takes all."""
    if not limit or limit >= count:
        return np.arange(count)
    return np.arange(limit) * count // limit


def spread_by_class(labels: np.ndarray, limit: int) -> np.ndarray:
    """`limit` rows that keep classes in proportion, in order; 0 takes all. Unlabelled rows count as one class.

    The rows are those of `spread`, unless classes alternate in the list, so that its steps meet some more often than
    others: then they are evenly spread over the list sorted by class.
    """
    rows = spread(len(labels), limit)
    return np.sort(np.argsort(labels, kind="stable")[rows]) if by_class(labels, limit) else rows


def by_class(labels: np.ndarray, limit: int) -> bool:
    """Whether `spread_by_class` takes others than the rows of `spread`."""
    rows = spread(len(labels), limit)
    return len(rows) < len(labels) and not _in_proportion(labels, rows)


def _in_proportion(labels: np.ndarray, rows: np.ndarray) -> bool:
    """Whether chance explains how often the classes are among the rows: Pearson's chi-square of rows drawn at random is
    about the number of classes, with a variance below three times that, where shares of less than one row count as one.
    Four deviations are allowed."""
    classes, class_of = np.unique(labels, return_inverse=True)
    fair = np.bincount(class_of) * (len(rows) / len(labels))
    found = np.bincount(class_of[rows], minlength=len(classes))
    uneven = np.sum((found - fair) ** 2 / np.maximum(fair, 1))
    return bool(uneven <= len(classes) + 4 * np.sqrt(3 * len(classes)))


def _index_file(folder: Path | None, name: str) -> Path | None:
    return folder / f"{name}.json" if folder else None


def _is_held_out(key: str) -> bool:
    """Decided by the key alone, so that adding images moves none from one side to the other."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little") % HELD_OUT == 0


def _refuse_two_numberings(found: dict[str, ImageList]) -> None:
    """DataError where one source names its classes and the other numbers them: a number may mean any of the names."""
    named = [source for source, images in found.items() if images.classes]
    numbered = [source for source, images in found.items() if not images.classes and any(images.labels >= 0)]
    if named and numbered:
        raise DataError(
            f"{named[0]} names its classes by folders and {numbered[0]} numbers them, so nothing tells which is which; "
            "give both as folders, or both as tars with <key>.cls"
        )


def _with_labels_of(train: ImageList, val: ImageList, val_source: str) -> ImageList:
    """Evaluation labels in training's numbering: classes go by their names where both have names."""
    if not train.classes or not val.classes or train.classes == val.classes:
        return val
    if unknown := sorted(set(val.classes) - set(train.classes)):
        raise DataError(
            f"{val_source} has class {unknown[0]!r}, which the training images lack; rename or remove that folder"
        )
    number = {name: label for label, name in enumerate(train.classes)}
    entries = tuple(replace(e, label=number[val.classes[e.label]] if e.label >= 0 else -1) for e in val.entries)
    return replace(val, entries=entries, classes=train.classes)


def _refuse_duplicates(source: str, index: Index) -> None:
    seen: dict[str, Entry] = {}
    for entry in index.entries:
        other = seen.setdefault(entry.key, entry)
        if other is not entry:
            raise DataError(f"{source} has key {entry.key} twice, in {other.file} and {entry.file}; rename one of them")
