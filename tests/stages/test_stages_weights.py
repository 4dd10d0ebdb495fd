"""Checkpoint files: every kind is read, nothing in them runs, what they are is their content."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from models.config import ModelConfig
from models.vit import Encoder, build_encoder
from stages import weights as module
from stages.weights import WeightsError, load_weights, read_checkpoint, weights_digest

MODEL = ModelConfig(image_size=16, patch_size=4, width=24, depth=2, heads=2, class_token=True)


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    torch.manual_seed(2)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes).eval()
    torch.nn.init.normal_(model.cls_token)
    return model


def written(path: Path, model: torch.nn.Module) -> Path:
    state = model.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:  # as MAE and DINO write theirs
        torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=1e-3), "scaler": {"scale": 2.0}}, path)
    return path


@pytest.mark.parametrize("suffix", module.SUFFIXES)
def test_every_kind_of_file_gives_timm_s_features(tmp_path: Path, theirs: torch.nn.Module, suffix: str) -> None:
    encoder: Encoder = build_encoder(MODEL, seed=0).eval()
    notes = load_weights(encoder, str(written(tmp_path / f"vit{suffix}", theirs)))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = encoder.norm(encoder.run(encoder.tokens(images), 0, 2))
        torch.testing.assert_close(found, theirs.forward_features(images), rtol=0, atol=1e-6)
    assert notes[-1] == "heads left out (head.bias and 1 more)"


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_runs(tmp_path: Path, theirs: torch.nn.Module) -> None:
    path = tmp_path / "vit.pth"
    torch.save({"model": theirs.state_dict(), "extra": Trap(tmp_path / "ran")}, path)
    with pytest.raises(WeightsError, match=r"vit.pth cannot be read as plain tensors \(.*; where it is whole, save"):
        read_checkpoint(str(path))
    assert not (tmp_path / "ran").exists()


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, theirs: torch.nn.Module) -> None:
    whole = written(tmp_path / "vit.safetensors", theirs)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-10])
    (tmp_path / "text.pt").write_text("no tensors")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "vit.ckpt").write_bytes(b"x")
    torch.save(theirs.state_dict()["pos_embed"], tmp_path / "tensor.pth")
    for name, message in {
        "none.pth": "is no file; give a checkpoint file",
        ".": "is a folder; give a checkpoint file",
        "vit.ckpt": "is none of .safetensors, .pt, .pth, .bin",
        "cut.safetensors": "cannot be read as plain tensors",
        "text.pt": "cannot be read as plain tensors",
        "empty.bin": "cannot be read as plain tensors",
        "tensor.pth": r"holds a Tensor, not a state; save its state_dict\(\)",
    }.items():
        with pytest.raises(WeightsError, match=message) as caught:
            read_checkpoint(str(tmp_path / name))
        assert "\n" not in str(caught.value) and str(caught.value).startswith("model.weights=")


def test_a_file_is_its_content_and_is_read_once(
    tmp_path: Path, theirs: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, index = written(tmp_path / "a.safetensors", theirs), tmp_path / "index" / "weights.json"
    digest = weights_digest(str(path), index)
    assert len(digest) == 64 and json.loads(index.read_text())["size"] == path.stat().st_size
    moved = path.rename(tmp_path / "b.safetensors")
    assert weights_digest(str(moved), None) == digest
    assert weights_digest(str(moved), index) == digest
    reads: list[object] = []
    plain = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, how: reads.append(how) or plain(file, how))
    assert weights_digest(str(moved), index) == digest and reads == []
    os.utime(moved, ns=(1, 1))
    assert weights_digest(str(moved), index) == digest and len(reads) == 1
    content = moved.read_bytes()
    moved.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = weights_digest(str(moved), index)
    assert changed != digest and len(reads) == 2
    moved.unlink()
    assert weights_digest(str(moved), index) == changed and len(reads) == 2
    with pytest.raises(WeightsError, match=r"a.safetensors is no file"):
        weights_digest(str(path), index)
    believed = index.read_bytes()
    index.write_bytes(believed.replace(changed[:8].encode(), b"00000000"))
    with pytest.raises(WeightsError, match=r"b.safetensors is no file"):  # an altered digest is no digest
        weights_digest(str(moved), index)
    index.write_bytes(b"\xff" + believed[1:])
    with pytest.raises(WeightsError, match=r"b.safetensors is no file"):
        weights_digest(str(moved), index)
    index.write_text("{")
    with pytest.raises(WeightsError, match="is no file"):
        weights_digest(str(moved), index)


@pytest.mark.parametrize("how", ["replaced", "in place"])
def test_another_content_of_equal_size_and_time_is_seen(tmp_path: Path, theirs: torch.nn.Module, how: str) -> None:
    path, index = written(tmp_path / "a.safetensors", theirs), tmp_path / "weights.json"
    digest, content, stat = weights_digest(str(path), index), path.read_bytes(), path.stat()
    other = path if how == "in place" else tmp_path / "b.safetensors"
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert weights_digest(str(path), index) == hashlib.sha256(path.read_bytes()).hexdigest() != digest


def test_a_file_that_changes_after_the_run_began_is_not_loaded(tmp_path: Path, theirs: torch.nn.Module) -> None:
    path = written(tmp_path / "a.safetensors", theirs)
    encoder, digest = build_encoder(MODEL, seed=0), weights_digest(str(path), None)
    load_weights(encoder, str(path), digest)
    before = {name: value.clone() for name, value in encoder.vit.state_dict().items()}
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightsError, match=f"model.weights={path} was changed since the run began; run again, which"):
        load_weights(encoder, str(path), digest)
    assert all(torch.equal(value, before[name]) for name, value in encoder.vit.state_dict().items())


def test_the_digest_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = "import sys, stages.weights; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)


def test_a_class_token_that_the_settings_lack_is_said_with_the_remedy(tmp_path: Path, theirs: torch.nn.Module) -> None:
    encoder = build_encoder(replace(MODEL, class_token=False), seed=0)
    with pytest.raises(ValueError, match=r"has a class token, .* set model.class_token=true"):
        load_weights(encoder, str(written(tmp_path / "vit.pth", theirs)))
