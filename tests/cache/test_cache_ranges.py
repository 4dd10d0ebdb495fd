"""What a mapped file does when mapping fails, and when its pages go while they are read."""

from __future__ import annotations

import mmap
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache.errors import CacheError, DamagedCache
from cache.ranges import LocalFile, MappedFile, RangeFile


def test_a_file_that_cannot_be_mapped_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **more: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    path = tmp_path / "shard"
    path.write_bytes(b"0123456789")
    found = np.zeros(4, np.uint8)
    MappedFile(path).read_into(3, [found[:1], found[1:]])
    assert bytes(found) == b"3456"
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(CacheError, match=r"shard cannot be mapped \(.*Cannot allocate memory\); .*cache.memory_mb$"):
        MappedFile(path)


@pytest.mark.parametrize("kind", [LocalFile, MappedFile])
def test_chunks_and_what_lies_behind_each(tmp_path: Path, kind: type[RangeFile]) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"..abcdEFghijKLmnopQR")
    out_NC = np.zeros((3, 4), np.uint8)
    behind_N2 = kind(path).read_chunks(2, out_NC, 2)
    assert [bytes(row) for row in out_NC] == [b"abcd", b"ghij", b"mnop"]
    assert [bytes(row) for row in behind_N2] == [b"EF", b"KL", b"QR"]
    with pytest.raises(DamagedCache, match="cut short"):
        kind(path).read_chunks(3, out_NC, 2)


CUT_SHORT = """
import os, sys
from pathlib import Path
import numpy as np
from cache.ranges import MappedFile
from pipeline.__main__ import main

main(["--version"])
path = Path(sys.argv[1])
file = MappedFile(path)
class Late:
    def size(self):
        os.truncate(path, 0)
        return file.size
file._map = Late()
file.read_chunks(0, np.zeros((1, file.size - 4), np.uint8), 4)
"""


def test_an_end_by_a_file_cut_short_under_its_map_says_where(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(1 << 20))
    done = subprocess.run(
        [sys.executable, "-c", CUT_SHORT, str(path)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr and "in read_chunks" in done.stderr
