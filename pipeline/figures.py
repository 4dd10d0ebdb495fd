"""The pictures of a run."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from pipeline.claims import standard_error

STYLE = {
    "e2e": ("end to end", "#444444", "o"),
    "freeze": ("frozen, still running forward", "#d98c21", "s"),
    "cached": ("frozen, cached", "#1f77b4", "D"),
}
PROBES = {"knn_top1": "kNN top-1", "linear_top1": "linear probe top-1"}


RECONSTRUCTION_ROWS = ("masked input", "reconstruction", "original")


def reconstructions(rows: np.ndarray, title: str, path: Path) -> None:
    """Pictures (3, N, S, S, 3) uint8 as a sheet: masked inputs, what the decoder fills in, originals."""
    lines, count, side = rows.shape[:3]
    # One image on one pair of axes: a pair for each of 24 pictures takes 1.6 (224 pixels) to 2.5 times (32) as long.
    gap = max(1, side // 14)
    framed = np.pad(rows, ((0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
    sheet = framed.swapaxes(1, 2).reshape(lines * (side + gap), count * (side + gap), 3)[gap:, gap:]
    figure, axis = plt.subplots(figsize=(1.15 * count + 0.4, 3.9), layout="constrained")
    axis.imshow(sheet, interpolation="nearest")
    centres = [(side + gap) * row + side / 2 for row in range(lines)]
    axis.set_yticks(centres, RECONSTRUCTION_ROWS, fontsize=9, rotation=90, va="center")
    axis.tick_params(length=0)
    axis.set_xticks([])
    axis.spines[:].set_visible(False)
    figure.suptitle(f"{title}: each hidden patch with the mean and contrast of the original", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def accuracy_against_time(speedup: dict[str, Any], path: Path) -> None:
    """Probe accuracy of the three arms against their seconds of training and caches: with one standard error, or, over
    seeds, the mean with its 95 % interval."""
    seeds = speedup.get("seeds", {"seeds": []})
    many = len(seeds["seeds"]) > 1
    end = speedup["arms"]["cached"]["total_seconds"]
    end = statistics.fmean(seeds["arms"]["cached"]["total_seconds"]) if many else end
    figure, axes = plt.subplots(1, len(PROBES), figsize=(10, 4.2), layout="constrained")
    for axis, (key, title) in zip(axes, PROBES.items(), strict=True):
        for name, (label, colour, marker) in STYLE.items():
            curve = (seeds if many else speedup)["arms"][name]["curve"]
            if any(point[key] is None for point in curve):
                axis.set_title("images without labels: nothing to score", fontsize=9)
                continue
            seconds, scores = [p["seconds"] for p in curve], [100 * p[key] for p in curve]
            errors = [100 * (p[f"{key}_half"] if many else standard_error(p[key], p["probe_images"])) for p in curve]
            style = {"color": colour, "marker": marker, "label": label, "linewidth": 1.8, "markersize": 5}
            axis.errorbar(seconds, scores, yerr=errors, elinewidth=0.6, capsize=2, **style)
        axis.axvline(end, color=STYLE["cached"][1], linestyle=":", linewidth=1)
        axis.set_xlabel("seconds of training and cache building")
        axis.set_ylabel(f"{title}, %")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(STYLE), frameon=False)
    ratio = f"total time end to end / cached: {speedup['speedup_total']:.2f}×"
    bars = f"mean and 95 % interval of {len(seeds['seeds'])} seeds" if many else "one standard error"
    figure.suptitle(f"{ratio}  (dotted: the cached arm's end; bars: {bars})")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
