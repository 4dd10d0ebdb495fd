"""Definitions written again, pixel by pixel, to compare with."""

from __future__ import annotations

import math


def slow_hog(image: list, num_bins: int, cell: int) -> list[list[float]]:
    """HOG of one plane by its definition, pixel by pixel."""
    size = len(image)

    def at(row: int, column: int) -> float:
        mirrored = [abs(i) if i < size else 2 * size - 2 - i for i in (row, column)]
        return image[mirrored[0]][mirrored[1]]

    cells = [[0.0] * num_bins for _ in range((size // cell) ** 2)]
    for r in range(size):
        for c in range(size):
            across = sum(w * (at(r + i, c - 1) - at(r + i, c + 1)) for i, w in ((-1, 1), (0, 2), (1, 1)))
            down = sum(w * (at(r - 1, c + i) - at(r + 1, c + i)) for i, w in ((-1, 1), (0, 2), (1, 1)))
            orientation = math.floor(math.atan2(across, down) / math.pi * num_bins) % num_bins
            cells[r // cell * (size // cell) + c // cell][orientation] += math.hypot(across, down) / cell**2
    return [[v / max(math.sqrt(sum(x * x for x in one)), 1e-12) for v in one] for one in cells]
