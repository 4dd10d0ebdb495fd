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

from cache.errors import CacheError
from cache.ranges import MappedFile


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
file.read_into(0, [np.zeros(file.size, np.uint8)])
"""


def test_an_end_by_a_file_cut_short_under_its_map_says_where(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(1 << 20))
    done = subprocess.run([sys.executable, "-c", CUT_SHORT, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGBUS
    assert "Bus error" in done.stderr and "in read_into" in done.stderr
