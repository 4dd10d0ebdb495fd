"""Ranks that train an arm together end where one process ends, with DDP and with FSDP2, for every kind of arm; stopped
with two ranks, one or four go on; what ranks do not share is found and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stages.checkpoint import read_state
from stages.images import ImageList
from stages.team import SOLO
from tests.ranks import on_ranks
from tests.stages.loop import STATE
from tests.stages.teamwork import ARMS, BOTH, ends_by_the_leader, train_all, train_one, ways_to_differ

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tar(colours: ImageList) -> str:
    """The file behind the images, which every rank opens by itself."""
    return colours.entries[0].file


@pytest.fixture(scope="module")
def alone(tar: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process comes to, by arm."""
    return {name: train_one(tmp_path_factory.mktemp("alone"), tar, name, "ddp", SOLO) for name in ARMS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def together(tar: str, folder: Path) -> dict[str, dict[str, Any]]:
    """The same of two ranks, with DDP and with FSDP2."""
    found = {"ddp": on_ranks(2, train_all, folder, tar, list(ARMS), "ddp")}
    found["fsdp"] = on_ranks(2, train_all, folder, tar, list(BOTH), "fsdp")
    return {kind: ranks[0] for kind, ranks in found.items()}


def assert_close(ours: Any, theirs: Any) -> None:
    (state, losses, progress), (want, want_losses, want_progress) = ours, theirs
    assert state.keys() == want.keys() and len(want_losses) >= 1
    for name, value in want.items():
        # The gradient of the keys' bias is 0 but for rounding, which Adam turns into whole steps.
        if not name.endswith("attn.qkv.bias"):
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(losses, want_losses, rtol=1e-5, atol=0.0)
    assert [part.images for part in progress.totals] == [part.images for part in want_progress.totals]
    assert [point["epoch"] for point in progress.curve] == [point["epoch"] for point in want_progress.curve]


@pytest.mark.parametrize("name", ARMS)
def test_two_ranks_end_where_one_process_ends(name: str, alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert_close(together["ddp"][name], alone[name])


@pytest.mark.parametrize("name", BOTH)
def test_two_ranks_that_share_the_weights_do_too(name: str, alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert_close(together["fsdp"][name], alone[name])


def test_a_state_is_whole_and_does_not_tell_the_ranks(tar: str, folder: Path, together: dict[str, Any], alone: Any) -> None:
    for name in BOTH:
        files = {kind: read_state(folder / f"{name}, {kind}" / STATE)[2] for kind in ("ddp", "fsdp")}
        shapes = {kind: {key: (t.shape, t.dtype) for key, t in found.items()} for kind, found in files.items()}
        assert shapes["ddp"] == shapes["fsdp"]
