"""The encoders of `train.save_epochs` that a training has passed and that are not there, since they were moved away or
asked for later: going on does not bring them back. Read by the training loop and by the verdicts. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open

from stages.segment import Segment


def passed_unkept(keep: Mapping[int, Path], segments: Sequence[Segment], steps: Iterable[int]) -> list[int]:
    """Epochs to keep that lie behind so many steps of each segment, and whose encoder is not there."""
    done = list(zip(segments, steps, strict=False))
    passed = [epoch for epoch in keep if any(part.completes(epoch, count) for part, count in done)]
    return [epoch for epoch in passed if not keep[epoch].exists()]


def told_unkept(epoch: int, kept: Path, state: Path, what: str) -> str:
    """In words what is wrong with going on without it."""
    return (
        f"{kept} is not there, and {state} has passed its epoch; put it back, take {epoch} from train.save_epochs, or "
        f"delete the state to train {what} anew"
    )


def goes_on(keep: Mapping[int, Path], segments: Sequence[Segment], state: Path, inputs: str, what: str) -> str:
    """How an unfinished training will go on, in words. A state of other inputs, or that cannot be read, is told of when
    that is tried."""
    try:
        with safe_open(state, framework="numpy") as file:
            header = file.metadata() or {}
        progress = json.loads(header["progress"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return f"goes on from {state.parent}"
    unfinished = header["inputs"] == inputs and progress["segment"] < len(segments)
    lost = passed_unkept(keep, segments, (part["steps"] for part in progress["totals"])) if unfinished else []
    return told_unkept(lost[0], keep[lost[0]], state, what) if lost else f"goes on from {state.parent}"
