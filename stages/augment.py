"""What fine-tuning does to images beyond cropping them: RandAugment on single views, in the loader's threads, and mixup
and cutmix over a batch, in the training step. Both are pure functions, of (seed, view, sample key) and (seed, step).

Shapes: B batch, C channels or width, H and W pixels or tokens, K classes, S side of a view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import NAME_TO_OP
from timm.data.mixup import mixup_target
from torch import Tensor

from models.spec import derive_seed
from models.targets import IMAGENET_MEAN
from stages.config import FinetuneConfig
from stages.views import Augment, uniform

# --- RandAugment ------------------------------------------------------------------------------------------------------

OPERATIONS, CHANCE, MAGNITUDE_STD = 2, 0.5, 0.5
"""Operations on a view, the chance of each, the deviation of its magnitude: timm's rand-m9-mstd0.5-inc1, as in MAE."""
DRAWS = 4
"""Random numbers that one operation takes: which, whether, how strong, in which direction."""
HOW = {"fillcolor": tuple(round(255 * mean) for mean in IMAGENET_MEAN), "resample": Image.Resampling.BICUBIC}


def _signed(largest: float) -> Callable[[float, int], tuple[float]]:
    return lambda share, sign: (sign * share * largest,)


def _enhance(share: float, sign: int) -> tuple[float]:
    return (max(0.1, 1 + sign * share * 0.9),)


LEVELS: dict[str, Callable[[float, int], tuple[float, ...]]] = {
    "AutoContrast": lambda share, sign: (),
    "Equalize": lambda share, sign: (),
    "Invert": lambda share, sign: (),
    "Rotate": _signed(30.0),
    "PosterizeIncreasing": lambda share, sign: (max(1, 4 - int(share * 4)),),  # Pillow refuses to keep 0 bits
    "SolarizeIncreasing": lambda share, sign: (256 - int(share * 256),),
    "SolarizeAdd": lambda share, sign: (int(share * 110),),
    "ColorIncreasing": _enhance,
    "ContrastIncreasing": _enhance,
    "BrightnessIncreasing": _enhance,
    "SharpnessIncreasing": _enhance,
    "ShearX": _signed(0.3),
    "ShearY": _signed(0.3),
    "TranslateXRel": _signed(0.45),
    "TranslateYRel": _signed(0.45),
}
"""The operations and what a magnitude, as a share of 10, and a direction mean to each; more is always stronger."""


def augmenter(magnitude: float, seed: int) -> Augment | None:
    """What is done to every view of a run; None where the magnitude is 0."""
    return partial(rand_augment, magnitude, seed) if magnitude else None


def rand_augment(magnitude: float, seed: int, pixels: np.ndarray, view: int, key: str) -> np.ndarray:
    """(S, S, 3) uint8: RandAugment (arXiv 1909.13719), as timm has it with magnitude noise and increasing severity.

    timm's operations draw from the process's global generators, which other threads draw from as well; here the numbers
    are drawn apart, and only the pixels are timm's.
    """
    image = Image.fromarray(pixels)
    names = tuple(LEVELS)
    for which, whether, strength, direction in uniform(OPERATIONS * DRAWS, seed, "augment", view, key).reshape(-1, 4):
        if whether < CHANCE:
            noisy = NormalDist(magnitude, MAGNITUDE_STD).inv_cdf(max(strength, 2**-53))
            share = min(max(noisy, 0.0), 10.0) / 10
            name = names[int(which * len(names))]
            operation: Any = NAME_TO_OP[name]
            image = operation(image, *LEVELS[name](share, -1 if direction < 0.5 else 1), **HOW)
    return np.asarray(image)


# --- mixup and cutmix -------------------------------------------------------------------------------------------------


class Mixer:
    """timm's mixup and cutmix over a batch and its labels, which become shares of classes, smoothed."""

    def __init__(self, config: FinetuneConfig, classes: int, seed: int) -> None:
        self.seed, self.classes, self.smoothing = seed, classes, config.label_smoothing
        self.mixup = (
            Mixup(config.mixup, config.cutmix, label_smoothing=self.smoothing, num_classes=classes)
            if config.mixup or config.cutmix
            else None
        )

    def __call__(self, values_BCHW: Tensor, labels_B: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) float, mixed, and (B, K) shares of classes, a pure function of inputs, seed and step.

        Images are mixed pixel by pixel. Behind frozen blocks they are features on their grid of tokens, which mixup
        blends and of which cutmix swaps a rectangle; a swapped token has attended to the whole of its own image.
        """
        if self.mixup is None:
            return values_BCHW, mixup_target(labels_B, self.classes, smoothing=self.smoothing)
        with global_numpy_seed(derive_seed(self.seed, "mix", step)):
            mixed_BCHW, targets_BK = self.mixup(values_BCHW.clone(), labels_B)
        return mixed_BCHW, targets_BK


@contextmanager
def global_numpy_seed(seed: int) -> Iterator[None]:
    """numpy's global generator, from which timm's Mixup draws, seeded within and as it was afterwards."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
