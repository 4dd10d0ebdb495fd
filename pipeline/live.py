"""How a run at work looks to people: an event as one line, and on a terminal a bar that is redrawn in place. Drawn when
events are logged and never in between, so that watching costs a training step nothing. Free of torch."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

SCORES = {"knn_top1": "kNN", "linear_top1": "linear probe", "top1": "top-1", "top5": "top-5"}


class Bar:
    """A line with a bar on a terminal. A new task begins a new line; what is finished stays on the screen."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._of = ""

    def show(self, event: dict[str, Any]) -> None:
        """Draw an event of progress."""
        of, done, total = progress_of(event)
        what, *rest = progress_line(event).split("  ")
        if self._progress is None or of != self._of:
            self.end()
            text = Column(no_wrap=True, overflow="ellipsis")
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[told]}", markup=False, table_column=text),
                console=self._console,
                auto_refresh=False,
                redirect_stderr=False,
            )
            self._progress.start()
            self._task = self._progress.add_task(what, total=total or None, told="")
            self._of = of
        self._progress.update(self._task, completed=done, total=total or None, told="  ".join(rest), refresh=True)
        if done == total:
            self.end()

    def end(self) -> None:
        """Leave the line as it is."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def watched(console: Console) -> bool:
    """Whether lines can be redrawn: a terminal, and not what only looks like one, as FORCE_COLOR makes a pipe do."""
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


def is_progress(event: dict[str, Any]) -> bool:
    """Whether an event tells how far training or the building of a cache is."""
    return "step" in event or ("shard" in event and not event.get("ahead"))


def progress_of(event: dict[str, Any]) -> tuple[str, int, int]:
    """(what is worked on, how much is done, of how much; 0 where nobody knows)."""
    if "shard" in event:
        return f"{place(event)} {event.get('cache', 'cache')}", event["shard"], event["shards"]
    return place(event), event["step"], event.get("steps", 0)


def finished(event: dict[str, Any]) -> bool:
    _, done, total = progress_of(event)
    return done == total


def progress_line(event: dict[str, Any]) -> str:
    """`stage 1  step 40/62  118 images/s  loss 0.912  waiting 2 %  0:11 left`, or
    `cache 1 (cut 3)  shard 2/8  310 images/s  0:05 left`, with what the event holds."""
    _, done, total = progress_of(event)
    if "shard" in event:
        doing = "repairing " if event.get("repair") else ""
        parts = [f"{doing}{event.get('cache', 'cache')} (cut {event['cut']})", f"shard {done}/{total}"]
    else:
        parts = [place(event).replace("-", " "), f"step {done}/{total}" if total else f"step {done}"]
    if rate := event.get("images_per_second"):
        parts.append(f"{rate:.0f} images/s")
    if event.get("loss") is not None:
        parts.append(f"loss {event['loss']:.3f}")
    if event.get("warning"):
        parts.append(event["warning"])
    if "loader_wait_fraction" in event:
        parts.append(f"waiting {100 * event['loader_wait_fraction']:.0f} %")
    if left := seconds_left(event):
        parts.append(f"{clock(left)} left")
    return "  ".join(parts)


def seconds_left(event: dict[str, Any]) -> float | None:
    """Seconds until what an event is of is finished, at the pace of the event; None where that is not known."""
    _, done, total = progress_of(event)
    rate, images = event.get("images_per_second"), event.get("images")
    return (total - done) * images / done / rate if rate and images and done < total else None


def clock(seconds: float) -> str:
    """`0:05`, `12:00`, `3:07:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def probe_line(event: dict[str, Any]) -> str:
    """`stage 1  epoch 4  kNN 0.312  linear probe 0.371`."""
    parts = [place(event).replace("-", " "), f"epoch {event.get('epoch', 0):g}"]
    scores = [f"{name} {event[key]:.3f}" for key, name in SCORES.items() if event.get(key) is not None]
    return "  ".join(parts + (scores or ["no labels, so neither kNN nor linear probe"]))


def place(event: dict[str, Any]) -> str:
    """What an event is of, as its folder is called: `stage-1`, `e2e`."""
    return f"stage-{event['stage']}" if "stage" in event else str(event.get("arm", "run"))
