"""What a decoder of pixels sees behind a mask, as pictures that people can read."""

from __future__ import annotations

import numpy as np
import torch

from models.masking import block_noise
from models.mim import MaskedModel
from models.multiscale import Head
from models.targets import patchify, pixels_of, unpatchify
from stages.device import autocast
from stages.images import ImageList, spread
from stages.sources import Sampling
from stages.views import centre_batch

COUNT = 8
GREY = 128


def pixel_head(model: MaskedModel) -> Head | None:
    """The last head that predicts normalised pixels of whole patches, if there is one."""
    found = [head for head in model.each_head if head.target == ("pixels", 1.0)]
    return found[-1] if found else None


@torch.inference_mode()
def reconstructions(
    model: MaskedModel, images: ImageList, sampling: Sampling, precision: str, progress: float = 0.0
) -> np.ndarray | None:
    """(3, N, S, S, 3) uint8: masked input, reconstruction with the visible patches in place, original.

    Centre views under masks of the run's kind when `progress` of it is done, the same at every call. None where no head
    predicts pixels.
    """
    head = pixel_head(model)
    if head is None or not len(images):
        return None
    patch, size = sampling.model.patch_size, sampling.model.image_size
    device = next(model.parameters()).device
    views = torch.from_numpy(centre_batch(images, spread(len(images), COUNT), size)).to(device)
    noise = torch.rand(len(views), sampling.model.num_tokens, generator=torch.Generator().manual_seed(0))
    noise = block_noise(noise, sampling.mask.block).to(device)
    learning = model.training
    model.eval()
    with autocast(device, precision):
        batch = model.from_images(views, noise, sampling.keep(progress))
        predicted = head.predict(model.encode(batch.visible_BKD)[head.spec.block], batch.whole)
    model.train(learning)
    pixels = patchify(views, patch)
    hidden = batch.mask.hidden.unsqueeze(-1) > 0
    seen = torch.where(hidden, torch.full_like(pixels, GREY), pixels)
    filled = torch.where(hidden, pixels_of(predicted, pixels), pixels)
    rows = [unpatchify(row, patch) for row in (seen, filled, pixels)]
    return torch.stack(rows).permute(0, 1, 3, 4, 2).cpu().numpy()
