"""Labels as supervised training needs them: one for every image, and more than one class. Free of torch, so that what
is missing is told before anything runs."""

from __future__ import annotations

import numpy as np

from stages.errors import DataError
from stages.images import Data

MOST = 2**20
"""Classes of a head at most. Larger labels are ids, which number no classes from 0."""


def require_labels(data: Data) -> None:
    """Raise DataError when an image that is trained or evaluated on has no label, when all have the same, and when
    labels are no numbers of classes."""
    for what, images in (("training", data.train), ("evaluation", data.val)):
        without = np.flatnonzero(images.labels < 0)
        if len(without):
            raise DataError(
                f"{len(without)} of {len(images)} {what} images have no label, first {images.keys[without[0]]}, and "
                "fine-tuning needs one for each; put images into a folder for each class, or give tars <key>.cls files"
            )


    if (count := num_classes(data)) > MOST:
        raise DataError(
            f"labels run to {count - 1}, above {MOST - 1}, and every number up to it would be a class of the head; "
            "number the classes from 0, or put the images into a folder for each"
        )
    if count < 2:
        raise DataError("all training images have the same label; fine-tuning needs at least 2 classes")


def num_classes(data: Data) -> int:
    """Classes that the training images tell apart; 0 without labels."""
    return max(len(data.train.classes), int(data.train.labels.max()) + 1)
