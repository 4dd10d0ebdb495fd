"""The device's side of a computation: threads, precision, and when its work is done."""

from __future__ import annotations

import torch


def autocast(device: str | torch.device, precision: str) -> torch.autocast:
    """Autocast to bfloat16, or nothing in float32. The residual stream stays float32 in both."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work, so that a clock read after it is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


HIDDEN_VALUES = 5_000_000
"""Of an MLP's hidden layer, the largest that a forward makes, 20 MB in float32. What is larger than 32 MB glibc takes
from the kernel afresh every time, page by page: 64 samples of the sample's size took 1.1 to 1.5 times as long."""


def best_batch(device: str, tokens: int, width: int, most: int) -> int:
    """Samples of so many tokens, `most` at most, that pass blocks at once where nothing learns: fewer on a CPU."""
    return min(most, max(1, HIDDEN_VALUES // (tokens * 4 * width))) if device == "cpu" else most
