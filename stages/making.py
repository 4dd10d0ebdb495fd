"""What computes features in this process, as far as it decides their numbers. A cache's name says what its client
wants; a worker that was started before an update, or in another environment, would make something else under it."""

from __future__ import annotations

import socket

import PIL
import timm
import torch

from cache.errors import CacheError
from models.spec import COMPUTATION_VERSION
from stages.views import AUGMENT_VERSION, VIEW_VERSION

MADE_WITH = (
    f"the frozen forward's version {COMPUTATION_VERSION}",
    f"the views' version {VIEW_VERSION}",
    f"the augmentation's version {AUGMENT_VERSION}",
    f"torch {torch.__version__.partition('+')[0]}",  # what is behind the plus, CPU or CUDA, may differ
    f"timm {timm.__version__}",
    f"Pillow {PIL.__version__}",
)
"""As this process has loaded it, whatever has been installed since."""


def check_made_with(wanted: tuple[str, ...]) -> None:
    """CacheError, naming this computer and what differs, unless it computes with what the client has."""
    both = (MADE_WITH, wanted), (wanted, MADE_WITH)
    here, there = (", ".join(name for name in names if name not in others) for names, others in both)
    if here or there:
        raise CacheError(
            f"the worker on {socket.gethostname()} has {here}, this run {there}: features could be others than their "
            "cache's name says; start the workers again, with this run's version and environment"
        )
