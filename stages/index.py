"""The index of a source of images: where every sample lies and what its bytes hash to. Made by reading everything once,
kept as sealed JSON, and made again when a byte of that, or a file's size, times or inode (`stamps`), have changed. What
lies behind URLs is indexed by `remote`, with what is here."""

from __future__ import annotations

import glob
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from cache.errors import CacheError
from cache.manifest import atomic_write, seal, unseal
from stages.errors import DataError
from stages.named import TORCHVISION, data_set
from stages.stamps import let_the_clock_tick, stamp_of

INDEX_VERSION = 4
IMAGE_SUFFIXES = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"})
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
PARTS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing", "eval"})
"""Folders of a data set that lie where classes would, in any case of letters."""
DEEP = frozenset({"I", "F"})
"""Pillow's modes of more than 8 bits a channel, of which making RGB cuts what is above 255; `I;16` is one of them."""

Reader = Callable[["Entry"], bytes | Image.Image]


@dataclass(frozen=True)
class Entry:
    """One sample."""

    key: str
    label: int
    file: str
    offset: int = 0
    size: int = -1
    """Bytes from `offset`; -1 for the whole file. For a torchvision data set `offset` is the row."""
    sha256: str = ""


@dataclass(frozen=True)
class Index:
    """All samples of a source, and what was left out."""

    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]


def indexed(source: str, on_bad: str, index_file: Path | None) -> tuple[Index, Reader]:
    """The index of a source, from `index_file` while that is still true, and a function that reads a sample."""
    by_name = source.partition(":")[0] in TORCHVISION and not Path(source).exists()
    files = [] if by_name else _files_of(source)
    read: Reader = _read_torchvision if by_name else _read
    stamps = [_stamp(path) for path in files]

    def make() -> Index:
        let_the_clock_tick(max((stamp[3] for stamp in stamps), default=0))
        entries, classes = _found(source, files)
        made = as_index(source, *inspect_all(entries, read, on_bad), classes)
        if changed := [path for path, stamp in zip(files, stamps, strict=True) if _stamp(path) != stamp]:
            raise DataError(f"{changed[0]} was changed while it was read; run again when nothing writes to {source}")
        return made

    return kept_or_made(index_file, header_of(source, on_bad, stamps), make), read


def kept_or_made(index_file: Path | None, header: dict[str, Any], make: Callable[[], Index]) -> Index:
    """The index on disk while it is true, else a new one, which is kept there."""
    found = kept_index(index_file, header)
    if found is None:
        found = make()
        keep_index(index_file, header, found)
    return found


def header_of(source: str, on_bad: str, stamps: list[list[Any]]) -> dict[str, Any]:
    """What an index on disk is true for."""
    return {"version": INDEX_VERSION, "source": source, "on_bad": on_bad, "files": stamps}


def keep_index(index_file: Path | None, header: dict[str, Any], index: Index) -> None:
    """Write an index for later, if somewhere."""
    if index_file:
        index_file.parent.mkdir(parents=True, exist_ok=True)
        values = {"entries": list(map(vars, index.entries)), "classes": index.classes, "skipped": index.skipped}
        atomic_write(index_file, seal(header | values))  # `asdict` would take ten times as long


def _stamp(path: Path) -> list[Any]:
    if not _is_text(str(path)):
        raise DataError(f"the name {str(path)!r} is no UTF-8; rename it")
    try:
        return [str(path), *stamp_of(path)]
    except OSError as error:
        raise DataError(f"{path} is gone ({error.strerror}); restore it, or run again without it") from error


def kept_index(index_file: Path | None, header: dict[str, Any]) -> Index | None:
    """The index on disk, unless anything that it was made from, or a byte of it, has changed."""
    try:
        values = unseal(index_file.read_bytes()) if index_file else {}
    except (OSError, ValueError):
        return None
    if any(values.get(name) != value for name, value in header.items()):
        return None
    entries = tuple(Entry(**entry) for entry in values["entries"])
    return Index(entries, tuple(values["classes"]), tuple((name, reason) for name, reason in values["skipped"]))


def _found(source: str, files: list[Path]) -> tuple[Iterable[Entry], tuple[str, ...]]:
    """The samples of a source, not yet read, and the names of their classes."""
    if not files:
        return _of_torchvision(source)
    if all(file.suffix == ".tar" for file in files):
        return [entry for file in files for entry in entries_of_tar(file)], ()
    names = [file.relative_to(source).as_posix() for file in files]
    return entries_of_folder(source, names, [str(file) for file in files])


def inspect_all(
    entries: Iterable[Entry], read: Reader, on_bad: str, threads: int | None = None
) -> tuple[list[Entry], list[tuple[str, str]]]:
    """Read, hash and decode every sample: (those that are images, what is none and why). What is none stops the run or
    is left out, as `on_bad` says."""
    entries = list(entries)
    _refuse_odd_keys(entries)
    good, skipped = [], []
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for entry, reason in pool.map(lambda entry: _inspect(entry, read), entries):
            if not reason:
                good.append(entry)
            elif on_bad == "skip":
                skipped.append((_name(entry), reason))
            else:
                raise DataError(
                    f"{_name(entry)} is no readable image ({reason}); remove it, or leave such files out with "
                    "data.on_bad=skip"
                )
    return good, skipped


def as_index(
    source: str, good: list[Entry], skipped: list[tuple[str, str]], classes: tuple[str, ...]
) -> Index:
    """What was found in a source. Raises DataError where nothing is left of it."""
    if not good and skipped:
        file, reason = skipped[0]
        raise DataError(
            f"{source} has no readable image, {len(skipped)} were left out, first {file} ({reason}); correct the source"
        )
    return Index(tuple(good), classes, tuple(skipped))


def _inspect(entry: Entry, read: Reader) -> tuple[Entry, str]:
    """(entry with its hash, what is wrong with it or nothing)."""
    try:
        content = read(entry)
        entry = replace(entry, sha256=content_hash(content))
        image = content if isinstance(content, Image.Image) else Image.open(io.BytesIO(content))
        image.draft("RGB", (1, 1))  # a JPEG decodes at an eighth of its size, faster and as surely
        image.load()
    except (CacheError, DataError):  # of a store: nothing is known of the image
        raise
    except UnidentifiedImageError:
        return entry, "not an image format that Pillow knows"
    except Exception as error:  # on damaged files Pillow's formats raise more than they say
        return entry, " ".join(str(error).split()) or type(error).__name__
    deep = image.mode.partition(";")[0] in DEEP
    return entry, "more than 8 bits a channel would be cut at 255; save it with 8" if deep else ""


def _refuse_odd_keys(entries: Iterable[Entry]) -> None:
    """DataError for the first key that is not encoded as UTF-8, as names of other systems may be: a key is hashed and
    stored as text."""
    for entry in entries:
        if not _is_text(entry.key):
            raise DataError(f"the name {entry.key!r} in {entry.file!r} is no UTF-8; rename it")


def _is_text(name: str) -> bool:
    try:
        return name.isascii() or bool(name.encode())
    except UnicodeEncodeError:  # Python keeps bytes that it cannot read as lone surrogates
        return False


def content_hash(content: bytes | Image.Image) -> str:
    """sha256 of what a sample was read as: a file's bytes, or the pixels of what torchvision hands out."""
    return hashlib.sha256(content if isinstance(content, bytes) else content.tobytes()).hexdigest()


def _name(entry: Entry) -> str:
    return entry.file if entry.size < 0 else f"{entry.file}:{entry.key}"


def _read(entry: Entry) -> bytes:
    with open(entry.file, "rb") as file:
        file.seek(entry.offset)
        return file.read(entry.size)


# --- folders and tars -------------------------------------------------------------------------------------------------


def _files_of(source: str) -> list[Path]:
    """The tars or image files that a source names. Raises DataError when there are none."""
    folder = Path(source)
    if folder.is_dir():
        # glob follows linked folders, as rglob does not, and leaves hidden files out.
        inside = glob.glob("**", root_dir=folder, recursive=True)
        files = sorted(path for name in inside if (path := folder / name).is_file())
        if not files:
            raise DataError(f"{source} is an empty folder; put images into it, or name another with DATA=")
        return files
    names = [name for pattern in expand(source) for name in (sorted(glob.glob(pattern)) or [pattern])]
    if not names:
        raise DataError(f"{source} names no file, its range is empty; write the smaller number first")
    for name in names:
        if not Path(name).is_file():
            raise DataError(f"no such file or folder {name}; {_nearest(Path(name))}")
        if not name.endswith(".tar"):
            raise DataError(
                f"{name} is no plain .tar; give a folder of images or uncompressed tars, as samples are read in place"
            )
    return [Path(name) for name in names]


def expand(source: str) -> list[str]:
    """`{000..012}` as WebDataset writes it."""
    match = BRACES.search(source)
    if not match:
        return [source]
    first, last = match.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [name for n in numbers for name in expand(source[: match.start()] + n + source[match.end() :])]


def _nearest(path: Path) -> str:
    there = next(parent for parent in path.absolute().parents if parent.is_dir())
    return f"{there} exists; give a folder of images, tars, or a torchvision name such as cifar10"


def entries_of_folder(source: str, names: list[str], files: list[str]) -> tuple[list[Entry], tuple[str, ...]]:
    """Key: the path inside the folder. Label: the place of its first sub-folder among the sorted names, else -1."""
    first = [folder if inside else None for folder, inside, _ in (name.partition("/") for name in names)]
    classes = tuple(sorted({folder for folder in first if folder is not None}))
    _refuse_parts(source.rstrip("/"), classes)
    number = {name: label for label, name in enumerate(classes)}
    return [
        Entry(name, -1 if folder is None else number[folder], file)
        for name, folder, file in zip(names, first, files, strict=True)
    ], classes


def _refuse_parts(source: str, classes: tuple[str, ...]) -> None:
    """DataError where all that would be classes are parts of a data set: probes would tell train from val."""
    if not classes or any(name.lower() not in PARTS for name in classes):
        return
    train = " or ".join(f"{source}/{name}" for name in classes if name.lower().startswith("train"))
    val = " or ".join(f"{source}/{name}" for name in classes if not name.lower().startswith("train"))
    raise DataError(
        f"{source} holds parts of a data set ({', '.join(classes)}) and no classes; give "
        + (f"{train} with DATA and {val} with DATA_VAL" if train and val else f"{train or val} instead")
    )


def entries_of_tar(file: Path, name: str = "") -> Iterator[Entry]:
    """Samples in the order of a tar; members that share a name up to its first dot are one sample. `name` is what the
    tar is called, where that is not the path at which it lies now."""
    called = name or str(file)
    first: dict[str, tarfile.TarInfo] = {}
    images: dict[str, tarfile.TarInfo] = {}
    beside: dict[str, list[str]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isfile() or any(part.startswith(".") for part in Path(member.name).parts):
                    continue
                folder, _, inside = member.name.rpartition("/")
                stem, _, suffix = inside.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                first.setdefault(key, member)
                if suffix.lower() in IMAGE_SUFFIXES:
                    if key in images:
                        raise DataError(f"{called} has two images of key {key}; a key names one image, rename one")
                    images[key] = member
                elif suffix.rpartition(".")[2].lower() in IMAGE_SUFFIXES:  # such as a.seg.png beside a.jpg
                    beside.setdefault(key, []).append(member.name)
                elif suffix == "cls":
                    labels[key] = _label(tar.extractfile(member), called, member.name)
    except tarfile.TarError as error:
        raise DataError(f"{called} is cut short or no uncompressed tar ({error}); copy it again") from error
    if not _ends(file):
        raise DataError(f"{called} is cut short, it lacks a tar's end; copy it again")
    for key, member in first.items():
        if key not in images and len(others := beside.get(key, [])) > 1:
            raise DataError(
                f"{called} has two images of key {key}, {others[0]} and {others[1]}: a key ends at the first dot of a "
                "name; rename them"
            )
        member = images.get(key, member)  # what has no image is met as a file that is none
        yield Entry(key, labels.get(key, -1), called, member.offset_data, member.size)


def _ends(file: Path) -> bool:
    """Whether a tar ends as tars do, in two empty blocks; tarfile does not miss them."""
    with open(file, "rb") as content:
        content.seek(max(0, file.stat().st_size - 2 * tarfile.BLOCKSIZE))
        return not any(content.read())


def _label(content: Any, file: str, name: str) -> int:
    text = content.read().decode(errors="replace").strip()
    if not text.isdecimal():
        raise DataError(f"{name} in {file} holds {text[:20]!r}, not the number of a class (0, 1, ...); correct it")
    return int(text)


# --- torchvision ------------------------------------------------------------------------------------------------------


def _of_torchvision(source: str) -> tuple[list[Entry], tuple[str, ...]]:
    data = data_set(source)
    return [Entry(f"{source}/{row:06d}", int(data[row][1]), source, row, 0) for row in range(len(data))], ()


def _read_torchvision(entry: Entry) -> Image.Image:
    image: Image.Image = data_set(entry.file)[entry.offset][0]
    return image
