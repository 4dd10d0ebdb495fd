"""The figures of the report, by matplotlib: inline SVG whose text is text and whose colours follow the page, and the
same as PNG in the run. Every figure says in words what it shows. Small, so that a phone shows them at full size."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from pipeline.claims import PROBES, mean_seconds, standard_error
from pipeline.figures import STYLE
from pipeline.sceptic import mean_points
from pipeline.speedup import cache_cost
from pipeline.story import Record, Story

INK = "#1b1f24"
SIZE = (4.8, 3.3)
RC: Any = {  # matplotlib types every key
    **{key: INK for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
    "svg.fonttype": "none",
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#8a8f98",
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
}
PARTS = {  # Okabe and Ito's palette, which the colour-blind tell apart; hatched, so that print without colour does, too
    "train": ("training", "#0072b2", ""),
    "wait": ("waiting for data", "#d55e00", "xxx"),
    "encode": ("building caches", "#e69f00", "///"),
    "evaluate": ("evaluation, counted for no arm", "#999999", "..."),
}
HEADS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Drawing:
    """A figure of the report."""

    name: str
    title: str
    alt: str
    """What it shows, in words and numbers."""
    note: str
    svg: str


def draw(
    name: str, title: str, alt: str, note: str, paint: Callable[[Axes], None], folder: Path, height: float = SIZE[1]
) -> Drawing:
    """Paint a figure; write it as <folder>/<name>.png and return it as SVG for the page."""
    with plt.rc_context(RC | {"svg.hashsalt": name}):
        figure, axis = plt.subplots(figsize=(SIZE[0], height), layout="constrained")
        paint(axis)
        text = io.StringIO()
        bare = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=bare)
        figure.suptitle(title, fontsize=10)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)
    return Drawing(name, title, alt, note, inline(text.getvalue(), name, alt))


def inline(svg: str, name: str, alt: str) -> str:
    """An SVG file as an element of a page: no outside names, colours that follow the page's, ids of its own."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", body).replace("xlink:href", "href")
    body = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    for colour, variable in ((INK, "ink"), *((style[1], key) for key, style in STYLE.items())):
        body = body.replace(colour, f"var(--{variable}, {colour})")
    view = re.search(r'viewBox="[^"]*"', body)
    assert view, "matplotlib writes one"
    rest = body[body.index(">") + 1 :]
    return f'<svg role="img" aria-label="{html.escape(alt)}" {view[0]} preserveAspectRatio="xMidYMid meet">{rest}'


def drawings(story: Story) -> dict[str, list[Drawing]]:
    """The figures that a run has numbers for, by the section that they stand in."""
    folder = story.paths.figures
    made: dict[str, list[Drawing | None]] = {
        "accuracy": [accuracy(story, key, folder) for key in PROBES if scored(story, key)],
        "time": [*times(story, folder)],
        "cuts": [cut_timeline(story, folder)] if story.stages else [],
        "loss": [loss_of_stages(story, folder), loss_of_arms(story, folder)],
        "collapse": [monitor(story, key, folder) for key in MONITORS if monitored(story, key)],
    }
    return {name: [one for one in found if one] for name, found in made.items()}


# --- accuracy and monitors, by arm ---------------------------------------------------------------------------------


def scored(story: Story, key: str) -> bool:
    return any(point[key] is not None for arm in story.summaries.values() for point in arm["curve"])


def accuracy(story: Story, key: str, folder: Path) -> Drawing:
    """A probe's accuracy of every arm against its seconds of training and caches: with one standard error, or, over
    seeds, the mean with its 95 % interval."""
    many = len(story.seeds) > 1
    courses = {
        name: mean_points([run["arms"][name]["curve"] for run in story.runs]) if many else arm["curve"]
        for name, arm in story.summaries.items()
    }
    curves = {name: [point for point in points if point[key] is not None] for name, points in courses.items()}

    def error(point: Record) -> float:
        half = point[f"{key}_half"] if many else standard_error(point[key], point["probe_images"])
        return 100 * float(half)

    def paint(axis: Axes) -> None:
        for name, points in curves.items():
            label, colour, marker = STYLE[name]
            axis.errorbar(
                [p["seconds"] for p in points],
                [100 * p[key] for p in points],
                yerr=[error(p) for p in points],
                color=colour,
                marker=marker,
                label=label,
                elinewidth=0.7,
                capsize=2,
            )
        if story.speedup:
            end = mean_seconds(story.runs or [story.speedup], "cached")
            axis.axvline(end, color=STYLE["cached"][1], linestyle=":", linewidth=1)
        axis.set(xlabel="seconds of training and cache building", ylabel=f"{PROBES[key]} top-1, %", xlim=(0, None))
        legend_below(axis)

    told = "; ".join(
        f"{STYLE[name][0]}: " + ", ".join(f"{100 * p[key]:.1f} % at {p['seconds']:.0f} s" for p in points)
        for name, points in curves.items()
    )
    one = "one standard error of the evaluation images"
    note = f"Bars: {f'mean and 95 % interval of {len(story.seeds)} seeds' if many else one}."
    note += " Dotted: the end of the cached arm." if story.speedup else ""
    title = f"{PROBES[key]} accuracy against seconds"
    return draw(f"accuracy-{key.partition('_')[0]}", title, told, note, paint, folder)


MONITORS = {
    "effective_rank": ("Effective rank of the features", "effective rank", "Falls towards 1 in a collapse."),
    "feature_std": ("Spread of the features", "std of unit features", "Falls towards 0 in a collapse."),
}


def monitor_curves(story: Story, key: str) -> dict[str, list[Record]]:
    return {
        name: [point for record in parts for point in record["curve"] if point.get(key) is not None]
        for name, parts in story.courses.items()
    }


def monitored(story: Story, key: str) -> bool:
    return any(monitor_curves(story, key).values())


def monitor(story: Story, key: str, folder: Path) -> Drawing:
    """A collapse monitor of every arm's encoder over the epochs."""
    title, axis_label, note = MONITORS[key]
    curves = monitor_curves(story, key)

    def paint(axis: Axes) -> None:
        for name, points in curves.items():
            label, colour, marker = STYLE[name]
            axis.plot([p["epoch"] for p in points], [p[key] for p in points], color=colour, marker=marker, label=label)
        highest = max(point[key] for points in curves.values() for point in points)
        axis.set(xlabel="epoch", ylabel=axis_label, ylim=(0, 1.1 * highest or 1), xlim=(0, None))
        legend_below(axis)

    told = "; ".join(
        f"{STYLE[name][0]}: " + ", ".join(f"{p[key]:.3g} at epoch {p['epoch']:g}" for p in points)
        for name, points in curves.items()
    )
    return draw(key.replace("_", "-"), title, told, note, paint, folder)


# --- time and cuts, by part -----------------------------------------------------------------------------------------


def spent(record: Record) -> dict[str, float]:
    """Where the seconds of a finished part, or of an arm's summary, went, by the keys of PARTS."""
    cached = record["cache_seconds"] if "total_seconds" in record else cache_cost(record)
    return {
        "train": record["train_seconds"] - record["loader_wait_seconds"],
        "wait": record["loader_wait_seconds"],
        "encode": cached,
        "evaluate": record["evaluate_seconds"],
    }


def times(story: Story, folder: Path) -> Iterator[Drawing]:
    """Seconds of the arms, and of the parts that are done, stacked by what they were spent on."""
    arms = {name: spent(arm) for name, arm in story.summaries.items()}
    parts = {name: spent(record) for name, record in story.records.items() if record["status"] == "done"}
    if len(arms) > 1:
        yield stacked("time-by-arm", "Where the seconds went, by arm", arms, "Stage 0 is counted in each.", folder)
    if parts:
        yield stacked("time-by-part", "Where the seconds went, by part", parts, "", folder)


def stacked(name: str, title: str, found: dict[str, dict[str, float]], note: str, folder: Path) -> Drawing:
    """A bar for everything that took seconds, stacked by PARTS."""
    names = list(found)

    def paint(axis: Axes) -> None:
        left = [0.0] * len(names)
        for key, (label, colour, hatch) in PARTS.items():
            widths = [found[name][key] for name in names]
            axis.barh(names, widths, 0.7, left, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=label)
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axis.invert_yaxis()
        axis.grid(visible=False, axis="y")
        axis.set(xlabel="seconds")
        legend_below(axis)

    told = "; ".join(
        f"{name}: " + ", ".join(f"{PARTS[key][0]} {seconds:.1f} s" for key, seconds in parts.items())
        for name, parts in found.items()
    )
    return draw(name, title, told, note, paint, folder, 1.5 + 0.28 * len(names))


@dataclass(frozen=True)
class Stretch:
    """Epochs in which the blocks before `cut` are frozen, those before `cached` skipped by a cache."""

    start: float
    epochs: float
    cut: int
    cached: int


def stretches(stages: Iterable[Record]) -> list[Stretch]:
    """The stretches of the finished stages in order."""
    found: list[Stretch] = []
    epoch = 0.0
    for record in stages:
        cached = record["cut"] if record["cache"] else 0  # what does not fit the disk budget runs live
        for segment in record["segments"]:
            found.append(Stretch(epoch, segment["epochs"], segment["cut"], cached))
            epoch += segment["epochs"]
    return found


def cut_timeline(story: Story, folder: Path) -> Drawing:
    """Which blocks learn, which are frozen and which of those a cache skips, epoch by epoch."""
    found = stretches(story.stages)
    depth = max(int(block) for block in story.stages[0]["frozen_weights"])
    kinds = {
        "learns": ("learns", "#009e73", ""),
        "in place": ("frozen, still runs forward", "#e69f00", "///"),
        "cached": ("frozen, read from the cache", "#56b4e9", ".."),
    }

    def paint(axis: Axes) -> None:
        used = set()
        for part in found:
            bands = {"cached": (0, part.cached), "in place": (part.cached, part.cut), "learns": (part.cut, depth)}
            for kind, (low, high) in bands.items():
                if high > low and part.epochs:
                    _, colour, hatch = kinds[kind]
                    axis.broken_barh(
                        [(part.start, part.epochs)],
                        (low + 0.5, high - low),
                        facecolor=colour,
                        hatch=hatch,
                        edgecolor="white",
                        linewidth=0.8,
                    )
                    used.add(kind)
        axis.set(xlabel="epoch", ylabel="block", ylim=(0.5, depth + 0.5), xlim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(visible=False)
        shown = [kind for name, kind in kinds.items() if name in used]
        patches = [Patch(facecolor=c, hatch=h, edgecolor="white", label=label) for label, c, h in shown]
        legend_below(axis, patches)

    told = "; ".join(
        f"epochs {part.start:g} to {part.start + part.epochs:g}: "
        + (f"blocks 1 to {part.cut} frozen" if part.cut else "all blocks learn")
        + (f", {part.cached} of them cached" if part.cut else "")
        for part in found
    )
    return draw("cuts", "Which blocks are frozen when", told, "Block 1 is the first one.", paint, folder)


# --- losses, over steps ---------------------------------------------------------------------------------------------


def lines_of_stages(story: Story) -> tuple[dict[str, list[tuple[list[int], list[float]]]], list[tuple[int, str]]]:
    """By head, a line for every stage that has it, over the steps of the run; and where which stage begins."""
    lines: dict[str, list[tuple[list[int], list[float]]]] = {}
    starts, before, stage = [], 0, 0
    while events := story.steps.get(f"stage-{stage}"):
        starts.append((before, f"stage {stage}"))
        for key in sorted({key for event in events for key in event if key.startswith("loss_")}):
            told = [event for event in events if event.get(key) is not None]
            line = ([before + event["step"] for event in told], [event[key] for event in told])
            lines.setdefault(key.removeprefix("loss_"), []).append(line)
        before += events[-1]["step"]
        stage += 1
    return lines, starts


def loss_of_stages(story: Story, folder: Path) -> Drawing | None:
    """The loss of every head over the steps of the stages."""
    lines, starts = lines_of_stages(story)
    if not lines:
        return None

    def paint(axis: Axes) -> None:
        for number, (head, parts) in enumerate(lines.items()):
            colour, dash = HEADS[number % len(HEADS)], DASHES[number // len(HEADS) % len(DASHES)]
            for part, (steps, losses) in enumerate(parts):
                axis.plot(steps, losses, color=colour, linestyle=dash, label="" if part else head.replace("_", " "))
        for start, _ in starts[1:]:
            axis.axvline(start, color=INK, linewidth=0.7, linestyle=":")
        for start, name in starts:
            short = name.removeprefix("stage ") if start else name
            axis.text(start, 1.01, short, fontsize=8, transform=axis.get_xaxis_transform())
        axis.set(xlabel="optimiser step; dotted: a stage begins", ylabel="loss", xlim=(0, None))
        legend_below(axis)

    told = "; ".join(
        f"{head}: "
        + ", ".join(
            f"{losses[0]:.3f} at step {steps[0]} to {losses[-1]:.3f} at step {steps[-1]}"
            for steps, losses in parts
            if steps
        )
        for head, parts in lines.items()
    )
    note = "Each point is the mean since the point before. A line is one head's own loss."
    return draw("loss-by-head", "Loss by head, the stages one after the other", told, note, paint, folder)


def loss_of_arms(story: Story, folder: Path) -> Drawing | None:
    """What each arm learned from, over its steps after stage 0."""
    lines = {name: story.steps[name] for name in ("e2e", "freeze") if story.steps.get(name)}
    if not lines:
        return None

    def paint(axis: Axes) -> None:
        for name, events in lines.items():
            label, colour, _ = STYLE[name]
            told = [event for event in events if event["loss"] is not None]
            axis.plot([e["step"] for e in told], [e["loss"] for e in told], color=colour, label=label)
        axis.set(xlabel="optimiser step after stage 0", ylabel="loss", xlim=(0, None))
        legend_below(axis)

    told = "; ".join(
        f"{STYLE[name][0]}: {events[0]['loss']:.3f} at step {events[0]['step']} to {events[-1]['loss']:.3f} "
        f"at step {events[-1]['step']}"
        for name, events in lines.items()
    )
    note = "The weighted sum that is learned from. Losses of arms do not say which encoder is better: the probes do."
    return draw("loss-of-arms", "Loss of the arms beside the stages", told, note, paint, folder)


def legend_below(axis: Axes, handles: Sequence[Any] | None = None, columns: int = 2) -> None:
    """The legend under the figure, outside of what it explains."""
    handles = handles if handles is not None else axis.get_legend_handles_labels()[0]
    figure = axis.get_figure()
    assert figure is not None
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9)
