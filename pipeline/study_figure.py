"""The figure of a study: accuracy against seconds by variant, or against epochs where seconds do not compare, mean and
interval over seeds, and below it how far each variant is from what it is compared with and from end to end stopped
after as many seconds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.claims import Paired, aligned, interval
from pipeline.comparable import seconds_unlike
from pipeline.outcome import MEASURES, Line, Row

MARKERS = "oDs^vP*X<>d"
TITLE = 70
"""Letters of a title over each column."""


def mean_curve(
    curves: Sequence[Sequence[Mapping[str, Any]]], key: str, when: str = "seconds"
) -> list[tuple[float, float, float]]:
    """(seconds, score, half of its 95 % interval) at the epochs that the curves of all seeds have; when: "epoch" for
    that in place of seconds, which are the mean over seeds of when a point was reached. One seed has intervals of 0.
    """
    told = [[point for point in curve if point.get(key) is not None] for curve in curves]
    found = []
    for points in aligned(told):
        scores = [point[key] for point in points]
        mean, half = interval(scores) if len(scores) > 1 else (scores[0], 0.0)
        found.append((statistics.fmean(point[when] for point in points), mean, half))
    return found


def drawn_against(rows: Sequence[Row]) -> tuple[str, str]:
    """What curves are drawn against, as their points name it and for people: seconds, or, where those of the rows do
    not compare, epochs, unless fine-tunings are among them, which have no curve."""
    done = [row for row in rows if row.state == "done"]
    unlike = seconds_unlike({f"{row.variant}, {row.seed}": row.values for row in done})
    if unlike and all(row.curve for row in done):
        return "epoch", "epochs (seconds do not compare)"
    return "seconds", "seconds of training and cache building" + (" (they do not compare)" if unlike else "")


def drawn(lines: Sequence[Line]) -> list[Line]:
    """The variants that a figure has room for: those with a finished seed, all where none has one."""
    return [line for line in lines if line.seeds] or list(lines)


def draw_study(title: str, lines: Sequence[Line], rows: Sequence[Row], path: Path) -> None:
    """Write the figure as PNG, of the variants that have finished a seed, if any has."""
    figure = study_figure(title, drawn(lines), rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def study_figure(title: str, lines: Sequence[Line], rows: Sequence[Row]) -> Figure:
    """The figure of some variants, a column a score, with the legend beside it; the caller closes it."""
    keys = [key for key in MEASURES if any(key in line.means for line in lines)] or ["knn_top1"]
    height = 4.4 + 0.32 * len(lines)
    figure, axes = plt.subplots(
        2,
        len(keys),
        figsize=(5.6 * len(keys), height),
        layout="constrained",
        squeeze=False,
        height_ratios=(3.4, 1 + 0.32 * len(lines)),
    )
    for column, key in enumerate(keys):
        curves(axes[0][column], key, lines, rows)
        differences(axes[1][column], key, lines)
    handles, labels = axes[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    # The layout keeps legend and title clear of the axes, not of each other: neither is at the upper right.
    wrapped = fill(title, TITLE * len(keys), break_on_hyphens=False)
    figure.suptitle(wrapped, fontsize=10, x=0.02, horizontalalignment="left")
    return figure


def curves(axis: Axes, key: str, lines: Sequence[Line], rows: Sequence[Row]) -> None:
    """A score of every variant against seconds or epochs: mean over its seeds, shaded by its interval."""
    when, what = drawn_against(rows)
    for number, (line, marker) in enumerate(zip(lines, cycle(MARKERS), strict=False)):
        own = [row for row in rows if row.variant == line.variant and row.state == "done"]
        points = mean_curve([row.curve for row in own], key, when) if own and all(row.curve for row in own) else []
        if not points and when == "seconds" and key in line.means and "total_seconds" in line.means:
            points = [(line.means["total_seconds"][0], line.means[key][0], line.means[key][1] or 0.0)]
        if not points:
            continue
        reached, means, halves = ([point[place] for point in points] for place in range(3))
        colour = plt.get_cmap("tab20")(number % 20)
        low = [100 * (mean - half) for mean, half in zip(means, halves, strict=True)]
        high = [100 * (mean + half) for mean, half in zip(means, halves, strict=True)]
        label = f"{line.variant} ({len(line.seeds)})"
        axis.plot(reached, [100 * mean for mean in means], color=colour, marker=marker, markersize=4, label=label)
        axis.fill_between(reached, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel=what, ylabel=f"{MEASURES[key]} top-1, %", xlim=(0, None))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def differences(axis: Axes, key: str, lines: Sequence[Line]) -> None:
    """Paired differences of every variant with their intervals; without seeds enough for one, hollow."""
    kinds = (("#1f77b4", "o", "less its control", "control"), ("#d55e00", "s", "less e2e stopped", "stopped"))
    for offset, (colour, marker, label, field) in zip((-0.15, 0.15), kinds, strict=True):
        pairs: list[tuple[int, Paired]] = [
            (place, pair) for place, line in enumerate(lines) if (pair := getattr(line, field).get(key))
        ]
        for number, (place, pair) in enumerate(pairs):
            axis.errorbar(
                100 * pair.mean,
                place + offset,
                xerr=100 * (pair.half or 0.0),
                color=colour,
                marker=marker,
                markersize=4,
                markerfacecolor=colour if pair.sure else "none",
                capsize=2,
                linestyle="none",
                label="" if number else label,
            )
    axis.axvline(0, color="#444444", linewidth=0.8)
    axis.set_yticks(range(len(lines)), [line.variant for line in lines], fontsize=8)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set(xlabel=f"{MEASURES[key]}, points; filled: claimed")
    axis.grid(alpha=0.25, axis="x")
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=7)
