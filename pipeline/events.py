"""What a run says while it works: one JSON object a line in events.jsonl, scalars for TensorBoard, and a progress bar
on a terminal or sparse plain lines elsewhere. Nothing is decided from these; they are for people and for plots."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console

from pipeline.live import SCORES, Bar, finished, is_progress, place, probe_line, progress_line, watched

if TYPE_CHECKING:
    import numpy as np

PLAIN_EVERY = 10.0
"""Seconds between two progress lines where there is no terminal."""
_LIVE_EVERY = 0.2


class EventLog:
    """Appends events to path and shows them. Use as a context manager; one writer a run, under the run's lock.

    Scalars of an event go to TensorBoard as `<stage or arm>/<field>` at its step, when tensorboard_dir is given.
    show=False writes the files and prints nothing.
    """

    def __init__(
        self,
        path: Path,
        tensorboard_dir: Path | None = None,
        show: bool = True,
        *,
        out: IO[str] | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell() and not _ends_with_newline(path):
            self._file.write("\n")  # a killed process left half a line; the next event must not be glued to it
        self._tensorboard_dir = tensorboard_dir
        self._board: Any = None
        self._now, self._shown = now, float("-inf")
        self._one = threading.Lock()  # views that are encoded beside training have events of their own
        self._console = Console(file=out or sys.stdout, highlight=False, soft_wrap=True) if show else None
        self._bar = Bar(self._console) if self._console and watched(self._console) else None

    def __call__(self, event: dict[str, Any]) -> None:
        """Writes the event with its time, and shows it when it is due."""
        with self._one:
            event = {"time": round(self._now(), 3)} | {key: _finite(value) for key, value in event.items()}
            self._file.write(json.dumps(event) + "\n")
            self._file.flush()
            self._scalars(event)
            self._show(event)

    def picture(self, place: str, sheet: np.ndarray, step: int) -> None:
        """Shows a picture (H, W, 3) uint8 in TensorBoard, at a step of a stage or arm such as `stage-1`."""
        if self._tensorboard_dir is not None:
            self._writer().add_image(f"{place}/reconstructions", sheet, step, dataformats="HWC")

    def message(self, text: str) -> None:
        """Prints a line for people."""
        if self._console is not None:
            self._console.print(text, markup=False)

    def close(self) -> None:
        if self._bar:
            self._bar.end()
        if self._board is not None:
            self._board.close()
        self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _scalars(self, event: dict[str, Any]) -> None:
        values = {key: value for key, value in event.items() if isinstance(value, int | float)}
        where, step = place(event), values.pop("step", round(values.get("epoch", -1)))  # probes are counted in epochs
        if "shard" in values:
            where, step = f"{where}/{event.get('cache', 'cache')}".replace(" ", "-"), values.pop("shard")
        if self._tensorboard_dir is None or step < 0:
            return
        board = self._writer()
        for key in sorted(values.keys() - {"time", "stage", "steps", "shards", "cut", "ahead"}):
            board.add_scalar(f"{where}/{key}", values[key], int(step), walltime=event["time"])

    def _writer(self) -> Any:
        if self._board is None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._tensorboard_dir))
        return self._board

    def _show(self, event: dict[str, Any]) -> None:
        if self._console is None:
            return
        if event.keys() & SCORES.keys():
            self.message(probe_line(event))
        if not is_progress(event):
            return
        last = finished(event)
        every = PLAIN_EVERY if self._bar is None else _LIVE_EVERY
        if event["time"] - self._shown < every and not last:
            return
        self._shown = event["time"]
        if self._bar:
            self._bar.show(event)
        else:
            self._console.print(progress_line(event), markup=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN; null keeps the line readable everywhere."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
