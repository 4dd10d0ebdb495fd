"""The checkpoint file that a run starts from, taken into its model, and everything told that was assumed, left out or
changed. Stands before stage 0, beside `work`."""

from __future__ import annotations

from collections.abc import Callable

from models.learner import Learner
from models.mim import MaskedModel
from models.normalisation import told
from models.teacher import EmaTeacher
from pipeline.decide import Wanted
from stages.weights import load_weights, stated_beside


def begin_from_file(wanted: Wanted, model: Learner, tell: Callable[[str], None]) -> None:
    """Load the checkpoint file that the settings name, if any, and tell how it takes images and what of it was left out
    or changed. Raises ModelError where it takes them otherwise than the settings give them."""
    if path := wanted.config.model.weights:
        normalised = told(wanted.config.model, stated_beside(path))
        notes = load_weights(model.encoder, path, wanted.weights)
        if isinstance(model, MaskedModel) and isinstance(model.teacher, EmaTeacher):
            model.teacher.restart(model.encoder)  # it was made before the file was read
        tell(f"weights {path} ({wanted.weights[:8]}): " + ("; ".join(notes) or "taken as they are"))
        tell(f"weights {path}: {normalised}")
