"""Memory that batches land in, kept from one batch to the next: fresh memory costs the kernel a page fault every 4 KiB,
which takes four times as long as reading itself. Between the loader's ring, which owns it, and the readers, which fill
it."""

from __future__ import annotations

import math

import torch


class Buffers:
    """Named tensors that are handed out again as long as they are asked for in the same shape.

    device: the GPU that they are copied to: they are then page-locked, so that it copies while the host goes on. None
    where they are read in place.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = device
        self._held: dict[str, torch.Tensor] = {}
        self._parts: dict[str, Buffers] = {}
        self._copied: torch.cuda.Event | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = sum(part.nbytes for part in self._parts.values())
        return sum(tensor.nbytes for tensor in self._held.values()) + parts

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor whose content is whatever it was; what was handed out under this name before is overwritten."""
        held, size = self._held.get(name), math.prod(shape)
        if held is None or held.dtype != dtype or len(held) < size:
            held = self._held[name] = torch.empty(size, dtype=dtype, pin_memory=self.device is not None)
        return held[:size].view(shape)

    def part(self, name: str) -> Buffers:
        """Buffers of their own, for a second reader of the same batch."""
        return self._parts.setdefault(name, Buffers(self.device))

    def retire(self) -> None:
        """Called when the batch in it has been used: copies to a GPU may still be under way."""
        if self.device is not None:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self.device))  # by default that of GPU 0, whichever trains

    def wait(self) -> None:
        """Called before it is filled again."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None


class Fresh(Buffers):
    """Hands out new memory every time, for readers whose batches are kept."""

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A new tensor."""
        return torch.empty(shape, dtype=dtype)

    def part(self, name: str) -> Buffers:
        """The same."""
        return self


FRESH = Fresh()
"""For whoever keeps what is read."""
