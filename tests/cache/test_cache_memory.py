"""Memory that reading takes stays within its setting, measured on a process of its own; no number depends on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cache import open_cache
from cache.loader import Prefetch
from cache.order import batch_rows
from pipeline.bench_memory import EpochFailed, epoch_memory
from tests.cache.conftest import make_example

LIMIT = 15_000_000


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "mapped"), [(512, False), (16, True)])
def test_an_epoch_keeps_within_the_limit(tmp_path: Path, samples: int, mapped: bool) -> None:
    """A cache of ten times the limit is read by position; one below half of it is mapped, and lies in memory whole."""
    wanted = make_example(samples, 64, image_size=112, patch_size=8, width=768, groups=1, views=1, pixels=False)
    wanted.build(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size <= LIMIT // 2 if mapped else size >= 10 * LIMIT
    found = epoch_memory(tmp_path, LIMIT, batch=4)
    assert found.total == pytest.approx(wanted.stored_VNLD[0, :, 0, 0].astype(float).sum(), abs=1e-3)
    assert len(found.curve) == samples // 4 and found.mapped == mapped
    assert max(found.curve) <= LIMIT, found.curve
    least = 2 * 4 * 196 * 768 * 4 if mapped else 4 * 196 * 768 * 4
    assert max(found.curve) >= least, "what is measured is what batches take"


def test_an_epoch_that_does_not_fit_says_why(tmp_path: Path) -> None:
    make_example().build(tmp_path)
    with pytest.raises(EpochFailed, match=r"two batches of 0.0 MB do not fit the half of cache.memory_mb"):
        epoch_memory(tmp_path, 1000, batch=2)


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_batches_are_the_same_bits_whatever_the_memory(tmp_path: Path, codec: str) -> None:
    wanted = make_example(24, 5, width=32, prefix=1, codec=codec, block=32 if codec == "int8" else 0)
    wanted.build(tmp_path)

    def epoch(memory: int, ahead: int, ring: float) -> list[tuple[torch.Tensor, ...]]:
        reader, found = open_cache(tmp_path, memory=memory), []
        assert reader._mapped == (memory > 0)  # type: ignore[attr-defined]
        with Prefetch(
            lambda step, into: reader.read(batch_rows(0, 0, step, 24, 4), step % 2, step % 4, into),
            range(6),
            threads=2,
            ahead=ahead,
            memory=ring,
        ) as batches:
            for batch in batches:
                parts = (batch.features_BLD, batch.ids_BL, batch.prefix_BSD, batch.pixels_BLP, batch.labels_B)
                found.append(tuple(part.clone() for part in parts if part is not None))
        return found

    little, much = epoch(0, 1, 50_000), epoch(2**30, 4, float("inf"))
    assert len(little) == len(much) == 6 and all(len(parts) == 5 for parts in little)
    for ours, theirs in zip(little, much, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
