"""Compiling a step: when it is done, and that it changes nothing but the time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from models.drop import DepthDrop
from stages.checkpoint import Progress
from stages.compiling import LONG, compiles
from stages.config import TrainConfig
from stages.images import ImageList, open_images
from stages.train import build_model, train_arm
from tests.stages.loop import BUILD, arm, hooks, parts, plain, stopped_and_resumed


@pytest.fixture(scope="module")
def images() -> ImageList:
    return open_images("sample").only(range(32))


def losses(progress: Progress) -> list[float]:
    return [part.loss_sum / part.steps for part in progress.totals]


@pytest.mark.slow
def test_a_compiled_step_gives_the_same_losses_and_resumes(images: ImageList, tmp_path: Path) -> None:
    """In float32 the kernels differ in their last bits only. The last part has frozen blocks before it."""
    segments = parts(0, 2)
    eager, _ = train_arm(arm(tmp_path / "eager", images, segments, compile="off"), hooks())
    compiled, model = train_arm(arm(tmp_path / "compiled", images, segments, compile="on"), hooks())
    assert model._compiled_call_impl is not None and model.encoder.vit.blocks[0]._compiled_call_impl is not None
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    assert plain(compiled) != plain(eager), "other kernels did run"
    stopped_and_resumed(lambda folder: arm(folder, images, segments, compile="on"), tmp_path, stops=(6,))


@pytest.mark.parametrize(
    ("how", "steps", "layer_drop", "there", "wanted"),
    [
        ("auto", LONG, 0.0, True, True),
        ("auto", LONG - 1, 0.0, True, False),
        ("auto", LONG, 0.5, True, False),
        ("auto", LONG, 0.0, False, False),
        ("off", LONG, 0.0, True, False),
        ("on", 1, 0.0, True, True),
    ],
)
def test_auto_compiles_long_segments_where_it_can(
    monkeypatch: pytest.MonkeyPatch, how: str, steps: int, layer_drop: float, there: bool, wanted: bool
) -> None:
    monkeypatch.setenv("CXX", "sh" if there else "no-such-compiler")
    monkeypatch.setattr("stages.compiling.shutil.which", lambda name: f"/bin/{name}" if name == "sh" else None)
    drop = DepthDrop(0, 0.0, layer_drop, 100)
    model = build_model(replace(BUILD, drop=drop), 0, "cpu")
    assert compiles(replace(TrainConfig(), compile=how), model, steps) == wanted  # type: ignore[arg-type]


