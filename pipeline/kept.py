"""The encoders of `train.save_epochs` that a stage or arm keeps on its way: which it should have, and which it has not.
Read by the verdicts and by the runner. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cache.manifest import atomic_write
from pipeline.layout import StagePaths
from stages.passed import goes_on
from stages.segment import Segment


def kept_epochs(epochs: Iterable[int], segments: Sequence[Segment]) -> tuple[int, ...]:
    """Those of `epochs`, trained by the whole run, that end inside the segments."""
    return tuple(epoch for epoch in sorted(set(epochs)) if any(part.completes(epoch, part.steps) for part in segments))


def last_epoch(segments: Sequence[Segment], record: dict[str, Any]) -> float:
    """Where a finished part ended: early, or where its segments do."""
    if record.get("ended"):
        return float(record["ended"]["epoch"])
    return segments[-1].trained(segments[-1].steps)


def lost_epochs(
    epochs: Iterable[int], segments: Sequence[Segment], record: dict[str, Any], paths: StagePaths
) -> tuple[int, ...]:
    """The epochs that a finished part has passed without keeping its encoder. Its last one is its model file."""
    last = last_epoch(segments, record)
    return tuple(epoch for epoch in kept_epochs(epochs, segments) if epoch < last and not paths.epoch(epoch).exists())


def going_on(
    epochs: Iterable[int], segments: Sequence[Segment], record: dict[str, Any], paths: StagePaths, what: str
) -> str:
    """How an unfinished part stands, and will go on."""
    keep = {epoch: paths.epoch(epoch) for epoch in kept_epochs(epochs, segments)}
    return f"status {record['status']}; {goes_on(keep, segments, paths.state, record['fingerprint'], what)}"


def never_reached(epochs: Iterable[int], segments: Sequence[Segment], record: dict[str, Any]) -> tuple[int, ...]:
    """The epochs that lie behind a part's early end."""
    last = last_epoch(segments, record)
    return tuple(epoch for epoch in kept_epochs(epochs, segments) if epoch > last)


def keep_last(epochs: Iterable[int], segments: Sequence[Segment], record: dict[str, Any], paths: StagePaths) -> None:
    """Where the last epoch of a finished part is asked for and not there, copy it from the model that it ended with."""
    for epoch in kept_epochs(epochs, segments):
        if epoch == last_epoch(segments, record) and not paths.epoch(epoch).exists():
            atomic_write(paths.epoch(epoch), paths.model.read_bytes())


def forget_epochs(paths: StagePaths) -> None:
    """Remove what was kept of a training that is begun anew."""
    for file in paths.root.glob("epoch-*.safetensors"):
        file.unlink()
