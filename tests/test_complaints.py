"""The complaints about other caches in docs/CACHE.md: each names its threads and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from pipeline.inputs import difference

REPOSITORY = Path(__file__).parents[1]
TABLE = re.compile(r"^## Complaints about caches.*?^\| --- .*?\n(.*?)(?:^$|\Z)", re.MULTILINE | re.DOTALL)
THREAD = re.compile(r"[\w.-]+/[\w.-]+(#\d+)?")


def complaints() -> list[list[str]]:
    found = TABLE.search((REPOSITORY / "docs" / "CACHE.md").read_text(encoding="utf-8"))
    assert found is not None
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in found[1].splitlines()]


def test_every_complaint_names_threads_and_tests_that_exist() -> None:
    tests = {
        node.name
        for path in (REPOSITORY / "tests").rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    rows = complaints()
    assert len(rows) >= 30 and all(len(row) == 4 for row in rows)
    for complaint, threads, why, named in rows:
        assert complaint and why
        assert all(THREAD.fullmatch(thread) for thread in threads.split(", ")), threads
        names = re.findall(r"`(\w+)`", named)
        assert names and ", ".join(f"`{name}`" for name in names) == named, named
        assert set(names) <= tests, f"{complaint}: no test {set(names) - tests}"


def test_settings_that_came_or_went_are_told() -> None:
    told = difference({"train.lr": 0.1, "gone": 1}, {"train.lr": 0.1, "new": [2]})
    assert told == "gone: 1 -> (none), new: (none) -> [2]"
