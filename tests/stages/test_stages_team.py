"""Ranks that train an arm together end where one process ends, with DDP and with FSDP2, for every kind of arm; stopped
with two ranks, one or four go on; what ranks do not share is found and named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.checkpoint import read_state
from stages.images import ImageList
from stages.team import SOLO
from tests.ranks import on_ranks
from tests.stages.loop import STATE
from tests.stages.teamwork import ARMS, BOTH, ended_by_the_leader, held, train_all, train_one, ways_to_differ

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
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(losses, want_losses, rtol=1e-5, atol=0.0)
    assert [part.images for part in progress.totals] == [part.images for part in want_progress.totals]
    assert [point["epoch"] for point in progress.curve] == [point["epoch"] for point in want_progress.curve]


@pytest.mark.parametrize("name", ARMS)
def test_two_ranks_end_where_one_process_ends(name: str, alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert_close(together["ddp"][name], alone[name])


@pytest.mark.parametrize("name", BOTH)
def test_two_ranks_that_share_the_weights_do_too(name: str, alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert_close(together["fsdp"][name], alone[name])


@pytest.mark.parametrize("name", BOTH)
def test_a_state_is_whole_and_knows_of_no_ranks(name: str, folder: Path, together: dict[str, Any]) -> None:
    found = [read_state(folder / f"{name}, {kind}" / STATE)[2] for kind in ("ddp", "fsdp")]
    shapes = [{key: (value.shape, value.dtype) for key, value in tensors.items()} for tensors in found]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 20


def test_each_rank_holds_its_part_of_the_weights(tar: str, tmp_path: Path) -> None:
    parts = on_ranks(2, held, tmp_path, tar)
    whole = parts[0][1]
    assert sum(part for part, _ in parts) == whole, "nothing is held twice"
    assert all(0.4 * whole < part < 0.6 * whole for part, _ in parts)


# --- stopped, and gone on with by others ------------------------------------------------------------------------------

ASKED_BEFORE = 4
"""The last rank wants to stop after its fifth step; all have agreed on that after the sixth of eight."""


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_what_two_ranks_began_one_or_four_go_on_with(
    parallel: str, tar: str, tmp_path: Path, alone: dict[str, Any]
) -> None:
    name = "plain"
    stopped = on_ranks(2, train_all, tmp_path / "two", tar, [name], parallel, ASKED_BEFORE)
    assert [rank[name][2].step for rank in stopped] == [6, 6]
    saved = read_state(tmp_path / "two" / f"{name}, {parallel}" / STATE)[1]
    assert (saved.step, saved.totals[0].images) == (6, 48)
    shutil.copytree(tmp_path / "two", tmp_path / "four")
    state, _, progress = train_one(tmp_path / "two", tar, name, parallel, SOLO)
    assert_close((state, alone[name][1], progress), alone[name])
    if parallel == "ddp":
        state, _, progress = on_ranks(4, train_all, tmp_path / "four", tar, [name], parallel)[0][name]
        assert_close((state, alone[name][1], progress), alone[name])


def test_one_process_asks_nobody() -> None:
    """What one process does at the places where ranks meet: nothing, so that its numbers stay what they were."""
    value = torch.tensor([1.0])
    assert SOLO.mean(value) is value and SOLO.told(value) is value and SOLO.threads(7) == 7
    assert SOLO.agreed(True, False) == (True, False) and SOLO.leads and not SOLO.sharded


# --- what ranks find out about each other -----------------------------------------------------------------------------


def test_ranks_that_do_not_share_what_they_should_are_named(tar: str, tmp_path: Path) -> None:
    first, second = on_ranks(2, ways_to_differ, tmp_path, tar)
    assert first == second
    for said, what in zip(first, ("state to start from", "cache", "model after step 4"), strict=True):
        assert said.startswith(f"rank 1 has another {what} than rank 0 (")
        assert "let all ranks see the same files" in said
    assert "01234567, holding " in first[1]


def test_the_leader_alone_evaluates_and_all_end_when_it_says_so(tar: str, tmp_path: Path) -> None:
    first, second = on_ranks(2, ended_by_the_leader, tmp_path, tar)
    assert first == (4, first[1], 1, 2) and "settled" in first[1]
    assert second == (4, first[1], 0, 0)
