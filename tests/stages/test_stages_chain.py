"""Caches of caches: how far they are from the images is measured on a few samples before anything is encoded, whatever
the blocks between make of what was lost before, and refused above the bound."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cache import open_cache
from cache.errors import StaleCache, TooCoarse
from cache.layout import Layout
from cache.manifest import CacheManifest, read_manifest, write_manifest
from cache.verify import remove_cache, verify_cache
from cache.writer import ErrorLimit
from models.config import ModelConfig
from models.masking import take_tokens
from models.targets import normalize_images
from models.vit import Encoder, build_encoder, frozen_hash
from stages import encode
from stages.config import DataConfig
from stages.encode import EncodeJob, build, view_error
from stages.images import open_data
from stages.mend import mend
from stages.views import image_batch, token_orders
from tests.encoding import encode_job, tiny_spec

MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=4, heads=2)
DATA = DataConfig(limit=30)
IMAGES = open_data(DATA).train
SAMPLED = [0, 3, 7, 11, 15, 18, 22, 26]
LIMIT = ErrorLimit(largest=0.05)
OFFSET = 32.0
"""What is added to every channel before the first cut: int8 loses a share of it, and the next layer norm removes it."""


def of_weights(offset: float = 0.0, scale: float = 1.0) -> Encoder:
    """An encoder whose second and third block make `scale` times as much of what they read."""
    encoder = build_encoder(MODEL, seed=3).eval()
    with torch.no_grad():
        encoder.vit.blocks[0].mlp.fc2.bias += offset
        for block in encoder.vit.blocks[1:3]:
            block.mlp.fc2.weight *= scale
    return encoder


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., EncodeJob]:
    """made(encoder, name, cut, codec, parent, groups) -> the job of a cache."""

    def job(
        encoder: Encoder, name: str, cut: int, codec: str = "int8", parent: EncodeJob | None = None, groups: int = 4
    ) -> EncodeJob:
        state = encoder.vit.state_dict()
        save_file(state, weights := tmp_path / "model.safetensors")
        folder = Path(parent.folder) if parent else None
        held = read_manifest(folder).fingerprint if folder else ""
        kept = {"codec": codec, "block": 8 if codec == "int8" else 0, "parent": held, "groups": groups, "pixels": True}
        spec = tiny_spec(IMAGES, DATA, frozen_hash(state, cut), cut, **kept)
        layout = Layout(spec, len(IMAGES), shard_rows=12)
        return encode_job(tmp_path / name, layout, MODEL, DATA, weights, batch=5, parent=folder, limit=LIMIT)

    return job


def built(job: EncodeJob) -> CacheManifest:
    list(build(job, IMAGES, map))
    return read_manifest(job.folder)


def rmse(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.sqrt(((found - want) ** 2).sum(dtype=np.float64) / (want**2).sum(dtype=np.float64)))


def measured(encoder: Encoder, job: EncodeJob) -> float:
    """The error of the worst view, of what the finished cache holds, by the public functions of encoder and cache."""
    spec, errors = job.layout.spec, []
    for view in range(spec.views):
        pixels, _ = image_batch(IMAGES, SAMPLED, view, DATA, 16, spec.seed)
        keys = tuple(IMAGES.keys[row] for row in SAMPLED)
        ids = token_orders(spec.seed, view, keys, spec.num_tokens, spec.groups, spec.mask_block)
        with torch.inference_mode():
            tokens = take_tokens(encoder.embed(normalize_images(torch.from_numpy(pixels))), torch.from_numpy(ids))
            groups = [encoder.run(part, 0, spec.cut) for part in tokens.chunk(spec.groups, dim=1)]
        found = open_cache(job.folder).read(SAMPLED, view).features_BLD
        errors.append(rmse(found.numpy(), torch.cat(groups, dim=1).numpy()))
    return max(errors)


@pytest.mark.parametrize("groups", [1, 4])
def test_a_chain_of_int8_caches_states_the_error_against_the_images(made: Callable[..., Any], groups: int) -> None:
    encoder = of_weights(scale=100.0)
    first = made(encoder, "one", 1, groups=groups)
    second = made(encoder, "two", 2, parent=first, groups=groups) if built(first) else first
    found = built(second)
    assert found.accumulated_error == pytest.approx(measured(encoder, second), rel=1e-3)
    assert found.error_samples == 8 and read_manifest(first.folder).error_samples == 0
    third = made(encoder, "three", 3, parent=second, groups=groups)
    assert built(third).accumulated_error == pytest.approx(measured(encoder, third), rel=1e-3)
    own = [max(error.relative_rmse for error in read_manifest(job.folder).errors) for job in (first, second, third)]
    assert own[2] < built(third).accumulated_error < sum(own), "errors of different sign do not simply add up"


def test_blocks_that_amplify_are_found_before_anything_is_encoded(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = of_weights(OFFSET, scale=1e4)
    first = made(encoder, "one", 1)
    lost = built(first).accumulated_error
    second = made(encoder, "two", 3, parent=first)
    shards: list[Any] = []
    monkeypatch.setattr(encode, "encode_shard", shards.append)
    want = r"int8 in blocks of 8 channels at cut 3, .+0\.\d{4} \(relative RMSE of 8 samples\).* cache.max_error = 0.05;"
    with pytest.raises(TooCoarse, match=want) as refused:
        list(build(second, IMAGES, map))
    assert shards == [] and "cache.codec=float16" in str(refused.value)
    monkeypatch.undo()
    loose = replace(second, limit=ErrorLimit(largest=1.0))
    found = built(loose)
    own = max(error.relative_rmse for error in found.errors)
    assert lost + own < 0.02, "what each cache loses by itself is far from the bound"
    assert found.accumulated_error == pytest.approx(measured(encoder, loose), rel=1e-3)
    assert found.accumulated_error > 0.08
    assert f"{found.accumulated_error:.4f}" in str(refused.value)


def test_a_float16_chain_is_built_and_far_from_the_bound(made: Callable[..., Any]) -> None:
    encoder = of_weights(scale=100.0)
    first = made(encoder, "one", 1, "float16")
    built(first)
    second = replace(made(encoder, "two", 3, "float16", parent=first), limit=ErrorLimit(largest=1e-3))
    found = built(second)
    assert found.accumulated_error == pytest.approx(measured(encoder, second), rel=1e-3) and found.error_samples == 8
    own = max(error.relative_rmse for error in found.errors)
    assert 1e-4 < own < found.accumulated_error < 2 * own


def test_workers_are_sent_the_views_and_open_no_images(made: Callable[..., Any], monkeypatch: Any) -> None:
    encoder = of_weights()
    first = made(encoder, "one", 1)
    built(first)
    second = made(encoder, "two", 3, parent=first)
    monkeypatch.setattr(encode, "training_images", None)
    told: list[str] = []
    tasks: list[bytes] = []

    def elsewhere(function: Callable[[Any], Any], given: Any) -> Iterator[Any]:
        for task in given:
            if function is view_error:
                tasks.append(pickle.dumps(task))
                task = pickle.loads(tasks[-1])
            yield function(task)

    list(build(second, IMAGES, elsewhere, told.append))
    found = read_manifest(second.folder).accumulated_error
    assert found == pytest.approx(measured(encoder, second), rel=1e-3)
    assert len(tasks) == 2 and max(map(len, tasks)) < 2 * 8 * 3 * 16 * 16 + 5_000, "a task for each view"
    assert told == [f"cut 3, built from the cache of cut 1: relative RMSE against the images {found:.2e}, of 8 samples"]


def test_what_was_measured_outlasts_a_stop_and_a_repair(made: Callable[..., Any]) -> None:
    encoder = of_weights(scale=100.0)
    first = made(encoder, "one", 1)
    built(first)
    second = made(encoder, "two", 2, parent=first)
    half = build(second, IMAGES, map)
    next(half)
    half.close()
    found = built(second)
    assert found.accumulated_error == pytest.approx(measured(encoder, second), rel=1e-3)
    told: list[str] = []
    assert list(build(second, IMAGES, map, told.append)) == [] and told == [], "a finished cache is not measured again"
    shard = next(entry.name for entry in found.shards if entry.moments)
    (Path(second.folder) / shard).write_bytes(b"")
    list(mend(second, IMAGES, verify_cache(Path(second.folder)), map))
    assert read_manifest(second.folder) == found


def test_a_chain_that_was_built_before_it_was_measured_says_so(made: Callable[..., Any]) -> None:
    """Its manifest has the sum; what continues it is measured all the same."""
    encoder = of_weights(scale=100.0)
    first = made(encoder, "one", 1)
    second = made(encoder, "two", 2, parent=first) if built(first) else first
    values = built(second).to_dict()
    assert values.pop("error_samples") == 8 and CacheManifest.from_dict(values | {"error_samples": 8}) == built(second)
    old = CacheManifest.from_dict(values | {"accumulated_error": 0.2})
    assert (old.error_samples, old.error_basis) == (0, "a sum over its caches, not measured")
    assert read_manifest(first.folder).error_basis == "of all samples" and built(second).error_basis == "of 8 samples"
    write_manifest(second.folder, old)
    third = made(encoder, "three", 3, parent=second)
    assert built(third).accumulated_error == pytest.approx(measured(encoder, third), rel=1e-3)


@pytest.mark.parametrize("when", ["while it is built", "between two builds"])
def test_what_was_made_of_a_parent_that_has_other_bits_now_is_made_again(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """As a repair may give: the same fingerprint, and not the same last bits."""
    encoder, told = of_weights(), list[str]()
    first = made(encoder, "one", 1, "float16")
    built(first)
    second = made(encoder, "two", 3, "float16", parent=first)
    half = build(second, IMAGES, map)
    next(half)

    def other(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        features, prefix = forward(*args)
        return features * 1.01, prefix

    def change() -> None:
        remove_cache(Path(first.folder))
        with monkeypatch.context() as patch:
            patch.setattr(encode, "frozen_forward", other)
            built(first)

    forward = encode.frozen_forward
    if when == "while it is built":
        change()
        with pytest.raises(StaleCache, match="was built anew while it was read; run again, which builds from what"):
            list(half)
    else:
        half.close()
        change()
    list(build(second, IMAGES, map, told.append))
    straight = replace(second, folder=second.folder + "-straight")
    files = [
        {entry.name: entry.checksum for entry in manifest.shards if entry.rows}
        for manifest in (read_manifest(second.folder), built(straight))
    ]
    assert files[0] == files[1] and "changed since" in told[0]
