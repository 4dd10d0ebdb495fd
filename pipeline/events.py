"""What a run says while it works: one JSON object a line in events.jsonl, scalars for TensorBoard, and a progress line
on a terminal or sparse plain lines elsewhere. Nothing is decided from these; they are for people and for plots."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    import numpy as np

PLAIN_EVERY = 10.0
"""Seconds between two progress lines where there is no terminal."""
_LIVE_EVERY = 0.2
SCORES = {"knn_top1": "kNN", "linear_top1": "linear probe", "top1": "top-1", "top5": "top-5"}


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
        self._console = Console(file=out or sys.stdout, highlight=False, soft_wrap=True) if show else None
        self._live: Live | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Writes the event with its time, and shows it when it is due."""
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
        self._end_live()
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
        step = values.pop("step", round(values.get("epoch", -1)))  # probes are counted in epochs
        if self._tensorboard_dir is None or step < 0:
            return
        board = self._writer()
        for key in sorted(values.keys() - {"time", "stage", "steps"}):
            board.add_scalar(f"{place(event)}/{key}", values[key], int(step), walltime=event["time"])

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
        if "step" not in event:
            return
        last = event["step"] == event.get("steps")
        every = _LIVE_EVERY if self._console.is_terminal else PLAIN_EVERY
        if event["time"] - self._shown < every and not last:
            return
        self._shown = event["time"]
        line = progress_line(event)
        if not self._console.is_terminal:
            self._console.print(line, markup=False)
            return
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False, redirect_stderr=False)
            self._live.start()
        self._live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)
        if last:  # the finished line stays on the screen; the next stage begins a new one
            self._end_live()

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def progress_line(event: dict[str, Any]) -> str:
    """`stage 1  step 40/62  118 images/s  loss 0.912  waiting 2 %  0:11 left`, with what the event holds."""
    step, steps, rate = event["step"], event.get("steps", 0), event.get("images_per_second")
    parts = [place(event).replace("-", " "), f"step {step}/{steps}" if steps else f"step {step}"]
    if rate:
        parts.append(f"{rate:.0f} images/s")
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("warning"):
        parts.append(event["warning"])
    if "loader_wait_fraction" in event:
        parts.append(f"waiting {100 * event['loader_wait_fraction']:.0f} %")
    if rate and step < steps and event.get("images"):
        seconds = round((steps - step) * event["images"] / step / rate)
        parts.append(f"{seconds // 60}:{seconds % 60:02d} left")
    return "  ".join(parts)


def probe_line(event: dict[str, Any]) -> str:
    """`stage 1  epoch 4  kNN 0.312  linear probe 0.371`."""
    parts = [place(event).replace("-", " "), f"epoch {event.get('epoch', 0):g}"]
    scores = [f"{name} {event[key]:.3f}" for key, name in SCORES.items() if event.get(key) is not None]
    return "  ".join(parts + (scores or ["no labels, so neither kNN nor linear probe"]))


def place(event: dict[str, Any]) -> str:
    """What an event is of, as its folder is called: `stage-1`, `e2e`."""
    return f"stage-{event['stage']}" if "stage" in event else str(event.get("arm", "run"))


def _finite(value: Any) -> Any:
    """JSON has no NaN; null keeps the line readable everywhere."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
