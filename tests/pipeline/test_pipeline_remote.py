"""A run whose images, starting weights and caches all lie behind URLs is the run with them on the disk; what it leaves
behind names no key; what cannot be reached, or should not be named, is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import save_file

from cache.patience import StoreConfig, store_settings, use_store
from models.config import ModelConfig
from models.vit import build_encoder
from pipeline import tasks
from pipeline.__main__ import main
from stages.weights import WeightsError, load_weights, read_checkpoint, weights_digest
from tests.faulty import Fault, FaultyStore
from tests.object_store import IMPATIENT, KEY, SECRET, ObjectStore
from tests.pipeline.toy import TOY, same, weights
from tests.stages.conftest import encoded, in_tar


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two tars of images and a checkpoint, below the folder that the store serves."""
    (tmp_path / "data").mkdir()
    for part in range(2):
        files = {f"{part}{row:02d}.png": encoded(100 * part + row, size=(20, 20)) for row in range(30)}
        labels = {f"{part}{row:02d}.cls": b"%d" % (row % 2) for row in range(30)}
        in_tar(tmp_path / "data" / f"train-{part:03d}.tar", files | labels)
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "class_token": False}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="avg", **sizes)
    save_file(model.state_dict(), tmp_path / "data" / "start.safetensors")
    return tmp_path


def words(where: str, run: Path, caches: str, **more: object) -> list[str]:
    """The arguments behind a verb."""
    sources = {"data.source": f"{where}/train-*.tar", "model.weights": f"{where}/start.safetensors"}
    plain = {"data.limit": 0, "cache.root": caches, "schedule.cuts": [0, 2], "schedule.epochs": [1, 1]}
    # A limit of its own, so that a client of its own is made, with the token.
    quick = {"store.retries": 2, "store.wait": 0.01, "store.timeout": 18}
    settings = TOY | sources | plain | quick | more
    told = [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in settings.items()]
    return ["--run", str(run), "--set", *told]


@pytest.mark.slow
def test_a_run_behind_urls_is_the_run_on_the_disk_and_repeats_no_key(
    faulty: FaultyStore, world: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", token := "a-token-that-nobody-may-read")
    url = faulty.store.url
    assert main(["stage", "1", *words(str(world / "data"), world / "here", str(world / "local"))]) == 0
    faulty.faults = [
        Fault("status", times=2, inside="train-001.tar"),
        Fault("cut", times=1, inside="start.safetensors"),
        Fault("status", times=1, method="PUT", inside="features/c/0"),
        Fault("short", times=1, inside="features/c/0"),
    ]
    there = words(url(world / "data"), world / "there", url(world / "caches"))
    assert main(["stage", "1", *there]) == 0
    assert [fault.times for fault in faulty.faults] == [0, 0, 0, 0]
    for stage in ("stage-0", "stage-1"):
        assert same(weights(world / "here", stage), weights(world / "there", stage))
    names = [sorted(path.name for path in (world / where).glob("cut-*")) for where in ("local", "caches")]
    assert names[0] == names[1] and len(names[0]) == 1
    events = [json.loads(line) for line in (world / "there/events.jsonl").read_text().splitlines()]
    (repeated,) = [event["store_requests_repeated"] for event in events if "store_requests_repeated" in event]
    assert repeated == 5
    assert main(["stage", "1", *there]) == 0
    assert main(["explain", *there]) == 0
    shown = capfd.readouterr()
    assert "object store: 5 requests were made again" in shown.out and "stage 1: current" in shown.out
    faulty.faults = [
        Fault("status", method=method, status=403, code="InvalidAccessKeyId", message=f"{KEY} {SECRET} {token}")
        for method in ("GET", "HEAD")
    ]
    assert main(["stage", "1", *there, "train.lr=0.5", "--debug"]) != 0
    after = capfd.readouterr()
    assert "is refused" in after.err.splitlines()[-1]
    assert "Traceback" in after.err, "which the server's own words are in, but for keys"
    for text in (*shown, *after):
        assert SECRET not in text and token not in text
    files = [path for folder in ("there", "caches") for path in (world / folder).rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        assert SECRET.encode() not in content and token.encode() not in content, path


@pytest.mark.parametrize("key", ["data.source", "data.val_source", "cache.root", "model.weights"])
def test_a_url_with_a_password_is_refused_without_repeating_it(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["explain", "--run", str(run), "--set", f"{key}=ftp://someone:hidden-word@host/x.tar"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"permafrost: {key} is a URL with a password") and told.count("\n") == 1
    assert "hidden-word" not in told and not run.exists()


def test_a_run_at_a_url_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--run", "s3://bucket/runs/1"]) == 2
    told = capsys.readouterr().err
    assert "--run s3://bucket/runs/1 is a URL" in told and "CACHE_ROOT" in told and told.count("\n") == 1


def test_a_checkpoint_at_a_url_is_its_content_read_once(faulty: FaultyStore, world: Path, tmp_path: Path) -> None:
    path, kept = world / "data/start.safetensors", tmp_path / "index/weights.json"
    url = faulty.store.url(path)
    digest = weights_digest(url, kept)
    assert digest == weights_digest(str(path), None)
    reads = faulty.count("GET", "start")
    assert weights_digest(url, kept) == digest and faulty.count("GET", "start") == reads
    encoder = build_encoder(ModelConfig(image_size=16, patch_size=4, width=32, depth=4, heads=2), seed=0)
    faulty.faults = [Fault("cut", times=1, inside="start")]
    load_weights(encoder, url, digest)
    name = "blocks.3.attn.qkv.weight"
    assert torch.equal(encoder.vit.state_dict()[name], read_checkpoint(str(path))[name])
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(10**18, 10**18))
    with pytest.raises(WeightsError, match=r"start.safetensors was changed since the run began; run again"):
        load_weights(encoder, url, digest)
    assert weights_digest(url, kept) == (other := weights_digest(str(path), None)) != digest
    path.unlink()
    assert weights_digest(url, kept) == other, "what was read and is gone is still what it was"
    with pytest.raises(WeightsError, match="is no file"):
        read_checkpoint(url)
    with pytest.raises(WeightsError, match="is none of"):
        weights_digest(faulty.store.url(world / "data/train-000.tar"), None)


def test_a_worker_asks_stores_as_its_sender_does(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = SimpleNamespace(log_event=lambda *_: None, get_current_task=lambda: "key", address="here")
    monkeypatch.setattr(tasks, "get_worker", lambda: worker)
    asked = StoreConfig(retries=7)
    assert tasks.on_worker("topic", tasks.MADE_WITH, asked, lambda task: task + store_settings().retries, 1) == 8
    use_store(IMPATIENT)


def test_a_bucket_that_is_not_there_is_named(object_store: ObjectStore) -> None:
    with pytest.raises(WeightsError, match=r"s3://no-such-bucket/a.pth is no file"):
        weights_digest("s3://no-such-bucket/a.pth", None)
