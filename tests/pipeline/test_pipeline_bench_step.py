"""What a step's time is made of, and that all ways of running it learn the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import bench_step
from pipeline.bench_step import PARTS, Step, bench_steps, kernel_bounds, largest_difference, part_of, profile_step
from pipeline.decide import Wanted
from pipeline.layout import RunPaths
from tests.pipeline.toy import toy


def test_every_way_of_running_a_step_gives_the_losses_of_the_straightforward_one(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_step, "ROUNDS", 2)
    monkeypatch.setattr(bench_step, "compiler", lambda: None)  # compiled steps: test_stages_compiling
    found = bench_steps(Wanted(toy(), RunPaths(finished)))
    assert set(found) == {f"cut {cut}, {way}" for cut in (0, 3) for way in ("straightforward", "ours")}
    for name, row in found.items():
        assert len(row["speed"]) == 2 and min(row["speed"]) > 0
        assert row["losses_differ"] < 1e-5, name  # float32: kernels differ in their last bits
    assert "losses differ by" in capsys.readouterr().out


def test_a_step_s_time_is_put_down_to_its_operations(finished: Path) -> None:
    spent = profile_step(Step.of(Wanted(toy(), RunPaths(finished)), 2), steps=1)
    assert set(spent) == {*PARTS, "other"}
    assert all(spent[part] > 0 for part in PARTS)


def test_the_bound_by_kernels_is_the_ratio_of_their_times_round_by_round(finished: Path) -> None:
    milliseconds = {0: [60.0, 66.0], 1: [40.0, 33.0], 3: [20.0, 30.0]}
    parts = {f"cut {cut}, ours": {"matrix multiplication": found} for cut, found in milliseconds.items()}
    assert kernel_bounds(Wanted(toy(), RunPaths(finished)), parts) == {1: [1.5, 2.0], 3: [3.0, 2.2]}


@pytest.mark.parametrize(
    ("operation", "part"),
    [
        ("aten::addmm", "matrix multiplication"),
        ("aten::convolution_backward", "matrix multiplication"),
        ("aten::_softmax_backward_data", "attention's softmax"),
        ("aten::gelu_backward", "GELU"),
        ("aten::native_layer_norm", "norms"),
        ("aten::_to_copy", "copies and casts"),
        ("aten::scatter_add_", "masks and gathers"),
        ("aten::_fused_adamw_", "optimiser"),
        ("aten::sum", "other"),
    ],
)
def test_operations_are_known_by_their_names(operation: str, part: str) -> None:
    assert part_of(operation) == part


def test_the_difference_of_two_curves_is_the_largest_relative_one() -> None:
    assert largest_difference([1.0, 2.2, 3.0], [1.0, 2.0, 3.3]) == pytest.approx(0.1)
    with pytest.raises(AssertionError):
        largest_difference([1.0, float("nan")], [1.0, 2.0])
