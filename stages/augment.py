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
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import NAME_TO_OP
from torch import Tensor
from torch.nn.functional import one_hot

from models.config import IMAGENET_MEAN
from models.spec import derive_seed
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
    draws = uniform(OPERATIONS * DRAWS, seed, "augment", view, key).reshape(OPERATIONS, DRAWS)
    for which, whether, strength, direction in draws:
        if whether < CHANCE:
            noisy = NormalDist(magnitude, MAGNITUDE_STD).inv_cdf(max(strength, 2**-53))
            share = min(max(noisy, 0.0), 10.0) / 10
            name = names[int(which * len(names))]
            operation: Any = NAME_TO_OP[name]
            image = operation(image, *LEVELS[name](share, -1 if direction < 0.5 else 1), **HOW)
    return np.asarray(image)


# --- mixup and cutmix -------------------------------------------------------------------------------------------------


class Mixer:
    """timm's mixup and cutmix over a batch. The images of a step are mixed in pairs, each with a share of the other."""

    def __init__(self, config: FinetuneConfig, seed: int) -> None:
        self.seed, self.mixes = seed, config.mixes
        self.alphas = config.mixup, config.cutmix

    def __call__(self, values_BCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The mixed values, and how much of each sample (second axis) is in each (first axis), (B, B) float32.

        A pure function of the values, the seed and the step. Images are mixed pixel by pixel. Behind frozen blocks they
        are features on their grid of tokens, which mixup blends and of which cutmix swaps a rectangle; a swapped token
        has attended to the whole of its own image, so the shares that the area gives are then only nearly true.
        """
        batch = len(values_BCHW)
        samples_B = torch.arange(batch, device=values_BCHW.device)
        if not self.mixes:
            return values_BCHW, torch.eye(batch, device=values_BCHW.device)
        mixup, cutmix = self.alphas
        # With every sample a class of its own, what becomes of labels is what becomes of samples.
        mix = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=batch)
        with global_numpy_seed(derive_seed(self.seed, "mix", step)):
            mixed_BCHW, samples_BB = mix(values_BCHW.clone(), samples_B)
        return mixed_BCHW, samples_BB


def smoothed(labels_B: Tensor, classes: int, smoothing: float) -> Tensor:
    """(B, K): how much of each class a sample is, a share of it spread over all classes."""
    return one_hot(labels_B, classes).float() * (1 - smoothing) + smoothing / classes


@contextmanager
def global_numpy_seed(seed: int) -> Iterator[None]:
    """numpy's global generator, from which timm's Mixup draws, seeded within and as it was afterwards."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)
