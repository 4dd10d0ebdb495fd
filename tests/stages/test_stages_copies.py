"""Local copies of remote images: bounded, the least recently used goes first, and only what hashes is believed."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest
from filelock import FileLock

from stages import copies as module
from stages.copies import Copies


def content(number: int, size: int = 100) -> bytes:
    return bytes([number]) * size


def name(number: int, size: int = 100) -> str:
    return sha256(content(number, size)).hexdigest()


def put(copies: Copies, number: int, size: int = 100, **how: bool) -> bool:
    return copies.put(name(number, size), content(number, size), **how)


def there(copies: Copies, count: int = 40) -> list[int]:
    return [number for number in range(count) if (copies.folder / name(number)[:2] / name(number)).exists()]


def aged(copies: Copies, *numbers: int) -> None:
    """These were used long ago, in this order."""
    for age, number in enumerate(numbers):
        os.utime(copies.folder / name(number)[:2] / name(number), ns=(0, age))


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    copies = Copies(tmp_path, 1000)
    assert all(put(copies, number) for number in range(10)) and there(copies) == list(range(10))
    aged(copies, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert copies.get(name(0)) == content(0)
    assert put(copies, 10)  # 1,000 and 100 are too many: down to nine tenths with it
    assert there(copies) == [0, 3, 4, 5, 6, 7, 8, 9, 10]


def test_one_process_never_passes_the_bound(tmp_path: Path) -> None:
    copies = Copies(tmp_path, 1000)
    for number in range(40):
        put(copies, number, 37 + number)
        assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 1000
    assert not put(copies, 99, 901), "what alone takes the room of all others"


def test_what_another_process_has_written_counts_after_a_sixteenth_of_the_bound(tmp_path: Path) -> None:
    copies, other = Copies(tmp_path, 1600), Copies(tmp_path, 1600)
    put(copies, 0)
    for number in range(1, 16):
        put(other, number)
    aged(copies, *range(16))
    assert put(copies, 16) and put(copies, 17)  # looks before each, a hundred being a sixteenth
    assert len(there(copies)) <= 16 and 0 not in there(copies)


def test_while_another_process_makes_room_nothing_is_kept_that_needs_some(tmp_path: Path) -> None:
    copies = Copies(tmp_path, 300)
    assert put(copies, 0) and put(copies, 1) and put(copies, 2)
    with FileLock(tmp_path / ".lock"):
        assert not put(copies, 3)
        assert not put(Copies(tmp_path, 300), 3), "it does not know how much is there"
    assert there(copies) == [0, 1, 2] and put(copies, 3)


@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 40), lambda file: file.write_bytes(content(7))])
def test_a_copy_that_was_cut_or_altered_is_none(tmp_path: Path, damage) -> None:
    copies = Copies(tmp_path, 1000)
    put(copies, 1)
    file = tmp_path / name(1)[:2] / name(1)
    damage(file)
    assert copies.get(name(1)) is None and not file.exists()
    assert put(copies, 1) and copies.get(name(1)) == content(1)


def test_what_only_takes_free_room_moves_nothing(tmp_path: Path) -> None:
    copies = Copies(tmp_path, 1000)
    kept = [put(copies, number, only_into_room=True) for number in range(12)]
    assert kept == [True] * 9 + [False] * 3 and there(copies) == list(range(9))


def test_remains_of_a_killed_process_count_and_go(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "x.tmp").write_bytes(b"x" * 950)
    os.utime(tmp_path / "ab" / "x.tmp", ns=(0, 0))
    copies = Copies(tmp_path, 1000)
    assert put(copies, 1) and not (tmp_path / "ab" / "x.tmp").exists()


def test_a_lower_bound_holds_for_what_is_there(tmp_path: Path) -> None:
    before = Copies(tmp_path, 1000)
    for number in range(9):
        put(before, number)
    aged(before, *range(9))
    assert put(Copies(tmp_path, 500), 20) and there(before) == [5, 6, 7, 8, 20]


def test_a_full_or_unwritable_disk_costs_nothing_but_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies(tmp_path, 1000)
    assert put(copies, 0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "SPARE", 1 << 60)
        assert not put(copies, 1)
    (tmp_path / "file").write_bytes(b"")
    assert not put(Copies(tmp_path / "file", 1000), 1)
    assert there(copies) == [0] and copies.get(name(5)) is None
