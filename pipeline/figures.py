"""The pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STYLE = {
    "e2e": ("end to end", "#444444", "o"),
    "freeze": ("frozen, still running forward", "#d98c21", "s"),
    "cached": ("frozen, cached", "#1f77b4", "D"),
}
PROBES = {"knn_top1": "kNN top-1", "linear_top1": "linear probe top-1"}


def accuracy_against_time(speedup: dict[str, Any], path: Path) -> None:
    """Probe accuracy of the three arms against the seconds that each has spent on training and caches."""
    figure, axes = plt.subplots(1, len(PROBES), figsize=(10, 4.2), layout="constrained")
    for axis, (key, title) in zip(axes, PROBES.items(), strict=True):
        for name, (label, colour, marker) in STYLE.items():
            curve = speedup["arms"][name]["curve"]
            if any(point[key] is None for point in curve):
                axis.set_title("images without labels: nothing to score", fontsize=9)
                continue
            seconds, scores = [p["seconds"] for p in curve], [100 * p[key] for p in curve]
            axis.plot(seconds, scores, marker=marker, color=colour, label=label, linewidth=1.8, markersize=5)
        axis.axvline(speedup["arms"]["cached"]["total_seconds"], color=STYLE["cached"][1], linestyle=":", linewidth=1)
        axis.set_xlabel("seconds of training and cache building")
        axis.set_ylabel(f"{title}, %")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if axes[0].lines[1:]:
        axes[0].legend(frameon=False)
    figure.suptitle(f"total time end to end / cached: {speedup['speedup_total']:.2f}×  (dotted: the cached arm's end)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
