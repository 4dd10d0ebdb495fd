"""Probes that are trained by gradient descent, at several learning rates at once: linear ones as MAE's (batch norm
without affine, then a linear layer; SGD or LARS), and an attentive one (a learned query attends to all tokens). The
rate is chosen on training images that are held back, never on the images that are reported on. Stands behind the
encoder's features, which are computed once.

Shapes: N samples, L tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.layers import AttentionPoolLatent
from timm.optim import Lars
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cache.order import batch_rows, steps_per_epoch
from models.spec import derive_seed
from stages.optim import learning_rate

LINEAR, ATTENTIVE = ("sgd", "lars"), "attentive"
WARMUP_SHARE = 0.1
"""Of a probe's steps, as MAE's 10 of 90 epochs."""
MOMENTUM = 0.9
ATTENTIVE_DECAY = 0.01
RATE_BATCH = 256
"""Images a step for which a rate of the linear probes is given; it grows with the batch, as in MAE."""


@dataclass(frozen=True)
class Recipe:
    """How a probe is trained."""

    kind: str
    """sgd, lars or attentive."""
    rates: tuple[float, ...]
    epochs: int
    batch: int
    heads: int
    """Attention heads of the attentive probe."""
    seed: int
    device: str = "cpu"


@dataclass(frozen=True)
class Swept:
    """What a sweep came to: the score of the rate that won, and how every rate did on the images held back."""

    top1: float
    rate: float
    held_back: dict[float, float]


def sweep(
    recipe: Recipe, train_x: Tensor, train_y: np.ndarray, val_x: Tensor, val_y: np.ndarray, hold_back: float
) -> Swept:
    """Choose the rate on held-back training images, train it again on all of them, score it on the validation images.

    x: (N, D) for the linear probes, (N, L, D) for the attentive one, of any float type. A tie goes to the earlier rate.
    """
    fit, held = held_back_rows(train_y, hold_back)
    classes = int(train_y.max()) + 1
    probes = train_probes(recipe, recipe.rates, train_x[fit], train_y[fit], classes)
    found = {
        rate: top1(probe, train_x[held], train_y[held], recipe)
        for rate, probe in zip(recipe.rates, probes, strict=True)
    }
    best = max(recipe.rates, key=lambda rate: found[rate])
    (probe,) = train_probes(recipe, (best,), train_x, train_y, classes)
    return Swept(top1(probe, val_x, val_y, recipe), best, found)


def held_back_rows(labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to choose on, at least one of each, every class in about the same share of both."""
    by_class = np.argsort(labels, kind="stable")
    count = min(max(1, round(share * len(labels))), len(labels) - 1)
    places = (2 * np.arange(count) + 1) * len(labels) // (2 * count)  # evenly spread, from the middle of each stretch
    held = np.zeros(len(labels), bool)
    held[by_class[places]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def train_probes(
    recipe: Recipe, rates: Sequence[float], x: Tensor, labels: np.ndarray, classes: int
) -> list[nn.Module]:
    """A probe for every rate, all trained on the same batches; each is what it would be if trained alone."""
    batch = min(recipe.batch, len(x))
    per_epoch = steps_per_epoch(len(x), batch)
    total = recipe.epochs * per_epoch
    probes = [build_probe(recipe, x.shape[-1], classes).train() for _ in rates]
    scale = batch / RATE_BATCH if recipe.kind in LINEAR else 1.0
    peaks = [rate * scale for rate in rates]
    optimizers = [OPTIMIZERS[recipe.kind](probe) for probe in probes]
    y = torch.from_numpy(labels).to(recipe.device)
    for step in range(total):
        epoch, place = divmod(step, per_epoch)
        rows = torch.from_numpy(batch_rows(recipe.seed, epoch, place, len(x), batch).copy())
        inputs = x[rows].to(recipe.device).float()
        for probe, optimizer, peak in zip(probes, optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total, int(WARMUP_SHARE * total), peak, 0.0, "cosine")
            optimizer.zero_grad(set_to_none=True)
            cross_entropy(probe(inputs), y[rows.to(y.device)]).backward()
            optimizer.step()
    return list(probes)


def build_probe(recipe: Recipe, width: int, classes: int) -> nn.Module:
    """The probe's module, its weights a pure function of the seed.

    Sources: the linear probe's batch norm and initialisation are those of facebookresearch/mae, main_linprobe.py; one
    query and a block of cross-attention before a linear layer is V-JEPA's attentive probe (arXiv 2404.08471).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "probe", recipe.kind))
        linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        if recipe.kind in LINEAR:
            # momentum None is the mean over all batches; a moving average needs some fifty steps to forget its start
            norm = nn.BatchNorm1d(width, affine=False, eps=1e-6, momentum=None)
            return nn.Sequential(norm, linear).to(recipe.device)
        pool = AttentionPoolLatent(width, num_heads=recipe.heads, norm_layer=nn.LayerNorm)
        return nn.Sequential(pool, linear).to(recipe.device)


@torch.inference_mode()
def top1(probe: nn.Module, x: Tensor, labels: np.ndarray, recipe: Recipe) -> float:
    """Share of the samples whose label has the largest logit; 0 for a probe that has diverged."""
    probe.eval()
    logits = torch.cat([probe(part.to(recipe.device).float()).cpu() for part in x.split(recipe.batch)])
    if not torch.isfinite(logits).all():
        return 0.0
    return float((logits.argmax(dim=1).numpy() == labels).mean())


def _sgd(probe: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(probe.parameters(), lr=0.0, momentum=MOMENTUM)


def _lars(probe: nn.Module) -> torch.optim.Optimizer:
    """MAE's LARS: matrices adapt their rate to their norm although nothing decays, biases do not."""
    groups = [
        {"params": [p for p in probe.parameters() if (p.ndim > 1) is matrix], "always_adapt": matrix}
        for matrix in (True, False)
    ]
    return Lars(groups, lr=1.0, momentum=MOMENTUM, weight_decay=0.0)


def _adamw(probe: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(probe.parameters(), lr=0.0, weight_decay=ATTENTIVE_DECAY)


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "lars": _lars,
    ATTENTIVE: _adamw,
}
