"""One finished toy run for all tests that only read it, and a copy for those that break it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import comparable, runner, speedup
from pipeline.studies import STUDIES
from tests.pipeline.toy import job, tiny


@pytest.fixture(scope="session", autouse=True)
def _short_measurements() -> Iterator[None]:
    """Toys are measured briefly, on a machine that other work may share, which is told where `crowds` is used."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparable, "CROWDED", math.inf)
        patch.setattr(speedup, "ARM_SECONDS", 0.02)
        patch.setattr(runner, "plan_first", lambda desk: None)  # a second a run; test_pipeline_foretold has it back
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "toy"
    runner.run_all(job(root))
    return root


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "toy")


@pytest.fixture
def crowds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds that were taken beside other work are told, as they are outside the tests."""
    monkeypatch.setattr(comparable, "CROWDED", 0.05)


@pytest.fixture
def studies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDIES, "tiny", tiny)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is trained, in order: run and part."""
    from pipeline import work

    found: list[str] = []
    plain: Callable[..., None] = work.train

    def train(desk: Any, paths: Any, *args: Any, **more: Any) -> None:
        found.append(f"{desk.job.paths.root.name}/{paths.root.name}")
        plain(desk, paths, *args, **more)

    monkeypatch.setattr(work, "train", train)
    return found
