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
