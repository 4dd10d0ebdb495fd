"""One shard of a WebDataset cache: a plain tar, and beside it an index (a plain .npy) of where every chunk lies, and
its crc32c, so that rows are read at random without scanning the tar. A chunk is one token group of an array of one
sample. Its checksum also covers what stands before it (headers, labels) and the padding behind it: together the chunks
cover every byte of the tar. Free of torch."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
from awscrt import checksums

from cache.checksum import Buffer
from cache.errors import DamagedCache
from cache.layout import RowArray, Stored
from cache.manifest import as_bytes
from cache.ranges import RangeFile

COLUMNS = 4
"""Of an index: where the bytes under a checksum begin and end, where the chunk itself begins, the crc32c."""
END = bytes(tarfile.BLOCKSIZE * 2)


def escape_key(key: str) -> str:
    """A key as the name of a tar's member. WebDataset cuts names at the first dot behind the last slash and skips
    names that begin with two underscores; tar readers may join, drop or follow odd slashes and dots."""
    name = quote(key, safe="/").replace(".", "%2E").replace("//", "/%2F")
    if name.startswith(("/", "__")):
        name = f"%{ord(name[0]):02X}{name[1:]}"
    return (name[:-1] + "%2F" if name.endswith("/") else name) or "%"


def unescape_key(name: str) -> str:
    """The reverse of `escape_key`."""
    return "" if name == "%" else unquote(name)


def npy_header(array: RowArray) -> bytes:
    """What stands before an array's values in its .npy member."""
    out = io.BytesIO()
    header = {"descr": np.dtype(array.dtype).str, "fortran_order": False, "shape": array.row_shape}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue()


def member_header(name: str, size: int) -> bytes:
    """A member's header block, the same on every machine and day; longer for names of more than 100 bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.PAX_FORMAT)


def padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def encode_tar(
    arrays: Sequence[RowArray],
    pieces: Iterable[Stored],
    keys: Sequence[str],
    labels: np.ndarray,
    index: list[tuple[int, int, int, int]],
) -> Iterator[Buffer]:
    """The tar of a shard, part by part; fills its index. Members of a sample: `<key>.cls`, then `<key>.<array>.npy` of
    every array."""
    offset = begin = crc = 0
    headers = {array.name: npy_header(array) for array in arrays}
    before = b""
    last = (len(keys) - 1, arrays[-1].name)
    rows = ({name: values[n] for name, values in piece.items()} for piece in pieces for n in range(len(piece["crop"])))
    for number, (row, key, label) in enumerate(zip(rows, keys, labels.tolist(), strict=True)):
        text = str(label).encode()
        before += member_header(f"{escape_key(key)}.cls", len(text)) + text + padding(len(text))
        for array in arrays:
            header, size = headers[array.name], array.splits * array.chunk_bytes
            before += member_header(f"{escape_key(key)}.{array.name}.npy", len(header) + size) + header
            values = np.ascontiguousarray(row[array.name], array.dtype).reshape(array.splits, -1)
            for split in range(array.splits):
                after = b""
                if split == array.splits - 1:
                    after = padding(len(header) + size) + (END if (number, array.name) == last else b"")
                data = offset + len(before)
                for part in (before, as_bytes(values[split]), after):
                    if part:
                        yield part
                        crc, offset = checksums.crc32c(part, crc), offset + len(part)
                index.append((begin, offset, data, crc))
                before, begin, crc = b"", offset, 0


def encode_index(index: Sequence[tuple[int, int, int, int]], rows: int) -> bytes:
    """The index of a tar as a .npy file."""
    return npy(np.array(index, "<u8").reshape(rows, -1, COLUMNS))


def npy(values: np.ndarray) -> bytes:
    """A .npy file."""
    out = io.BytesIO()
    np.save(out, values, allow_pickle=False)
    return out.getvalue()


class TarShard:
    """An open tar; a chunk's crc32c is checked when it is read. `sizes`: bytes of a sample's chunks, in order."""

    def __init__(self, path: Path, file: RangeFile, index: np.ndarray, sizes: Sequence[int]) -> None:
        self.path, self._file, self._sizes = path, file, tuple(sizes)
        self._index = index.reshape(-1, COLUMNS)

    def read(self, first: int, out_NC: np.ndarray) -> None:
        """N adjacent chunks of C bytes from chunk `first` on, counted from the shard's first, into uint8 rows."""
        number, size = out_NC.shape
        assert (size,) * number == tuple(self._sizes[(first + n) % len(self._sizes)] for n in range(number))
        places = self._index[first : first + number].tolist()
        before = [np.empty(data - begin, np.uint8) for begin, _, data, _ in places]
        after = [np.empty(end - data - size, np.uint8) for _, end, data, _ in places]
        parts = list(zip(before, out_NC, after, strict=True))
        self._file.read_into(places[0][0], [buffer for part in parts for buffer in part if len(buffer)])
        for chunk, (part, place) in enumerate(zip(parts, places, strict=True), first):
            crc = 0
            for buffer in part:
                crc = checksums.crc32c(buffer, crc)
            if crc != place[3]:
                raise DamagedCache(f"{self.path} is altered in chunk {chunk}; run `make repair`")
