"""Compiling a step: when it is done, and that it changes nothing but the time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from models.config import HeadSpec, MaskConfig
from models.drop import DepthDrop
from stages.checkpoint import Progress
from stages.compiling import LONG, compile_learner, compiles
from stages.config import DataConfig, TrainConfig
from stages.images import ImageList, open_images
from stages.sources import LiveImages, Sampling
from stages.train import build_model, train_arm, train_step
from tests.stages.loop import BUILD, MODEL, TRAIN, arm, hooks, parts, plain, stopped_and_resumed


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


@pytest.mark.slow
def test_a_segment_at_every_cut_of_one_process_is_compiled(monkeypatch: pytest.MonkeyPatch, images: ImageList) -> None:
    """torch compiles a function 8 times and then, with a warning, runs it as it is: the cut is one of what it compiles
    for. A FreezeOut run of 12 blocks has 12 cuts. Here 4 cuts are more than 2 times, and no code is generated, which
    takes longest."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 2)
    compile_of, graphs = torch.nn.Module.compile, [0]

    def counted(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        def run(*values: torch.Tensor) -> Any:
            graphs[0] += 1
            return graph(*values)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile_of(module, backend=counted))
    heads = (HeadSpec(4, "pixels"),)
    build = replace(BUILD, model=replace(MODEL, depth=4), heads=heads)
    source = LiveImages(images, Sampling(0, 8, DataConfig(), build.model, MaskConfig(), heads))
    ran = []
    for cut in range(4):
        model = build_model(build, cut, "cpu")
        compile_learner(model)
        optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.0)
        graphs[0] = 0
        train_step(model, optimizer, source, source.load(parts(cut)[0], 0), TRAIN)
        ran.append(graphs[0])
    whole = ran[0]  # 1, but for what checks the types of arguments under test
    assert ran == [whole + cut for cut in range(4)], "frozen blocks one by one, and what learns as at cut 0"


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
