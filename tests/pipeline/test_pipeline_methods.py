"""Every way to mask, to predict and to decode, through images, caches and arms: cached equals live, settings matter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.config import HeadSpec
from pipeline import equivalence, runner
from pipeline.config import ConfigError
from pipeline.decide import Wanted, judge_stage
from pipeline.feeds import sampling
from pipeline.figures import reconstructions as draw_reconstructions
from pipeline.layout import RunPaths
from stages.pictures import reconstructions
from stages.sources import LiveImages
from tests.pipeline.toy import job, record, same, toy, weights

METHODS: dict[str, dict[str, object]] = {
    "hog": {"target.kind": "hog"},
    "localmim": {"heads.blocks": [1, 2, 4], "heads.scales": [4, 2, 0.5], "target.kind": "hog"},
    "local pixels": {"heads.blocks": [2, 4], "heads.scales": [2, 1], "heads.weights": "1/2,1"},
    "mixed targets": {"heads.blocks": [2, 3, 4], "heads.targets": ["hog", "pixels", "features"], "mask.groups": 1},
    "features at every depth": {"heads.blocks": [2, 3, 4], "target.kind": "features"},
    "every block": {"heads.blocks": [1, 2, 3, 4]},
    "weights that change": {"heads.blocks": [2, 4], "heads.weights": "4,1:0,1"},
    "pruned decoder": {"decoder.share": 0.5},
    "pruned decoder, pooled": {"decoder.share": 0.25, "mask.groups": 2},
    "rising ratio": {"mask.ratio": 0.75, "mask.ratio_end": 0.9},
    "block-wise": {"mask.block": 2},
    "block-wise, pooled": {"mask.block": 2, "mask.groups": 2},
    "block-wise, full": {"mask.block": 2, "mask.groups": 1},
    "far tokens weigh more": {"mask.distance_power": 1.0},
    "near tokens first": {"mask.distance_start": 0.25, "decoder.share": 0.5},
    "frozen teacher, mixed": {"heads.blocks": [2, 3, 4], "heads.targets": ["hog", "features", "teacher"]},
    "average, pooled": {"target.kind": "teacher", "teacher.kind": "ema", "mask.groups": 2},
    "average, transitive": {"heads.blocks": [2, 4], "teacher.pairs": "earlier", "teacher.momentum": 0.9}
    | {"target.kind": "teacher", "teacher.kind": "ema"},
    "dropped depth": {"train.drop_path": 0.3, "train.layer_drop": 0.8},
    "pixels cut again": {"cache.pixels": "recut", "target.kind": "hog"},
}


def events(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "events.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_from_the_cache_as_it_would_live(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = toy(**METHODS[method])
    runner.run_stage(job(tmp_path, config, target=2))
    equivalence.run_equivalence(job(tmp_path, config))  # raises where cached and live differ by more than 1e-3
    out = capsys.readouterr().out
    wanted = Wanted(config, RunPaths(tmp_path))
    for stage, segment in enumerate(wanted.segments):
        assert judge_stage(wanted, stage).current
        learned = [event for event in events(tmp_path) if event.get("stage") == stage and "loss" in event]
        heads = {key for key in learned[0] if key.startswith("loss_")}
        names = [head.name for head in wanted.heads if head.block > segment.cut]
        assert len(heads) == len(names)
        assert not stage or heads == {f"loss_{name}" for name in names}
        gone = [head.name for head in wanted.heads if head.block <= segment.cut]
        assert (f"stage {stage}: {', '.join(gone)} read frozen blocks and are gone" in out) == bool(gone)
    before, after = weights(tmp_path, "stage-1"), weights(tmp_path, "stage-2")
    assert same(before, after, "blocks.2.") and not same(before, after, "blocks.3.")


@pytest.mark.slow
def test_both_arms_train_with_heads_of_several_depths(tmp_path: Path) -> None:
    config = toy(**METHODS["localmim"])
    for arm in ("e2e", "freeze"):
        runner.run_arm(job(tmp_path, config, target=arm))
    told = [event for event in events(tmp_path) if event.get("arm") == "freeze" and "loss" in event]
    assert {len([key for key in event if key.startswith("loss_")]) for event in told} == {2, 1}
    everything = [event for event in events(tmp_path) if event.get("arm") == "e2e" and "loss" in event]
    assert all("loss_block1_hog_x4" in event for event in everything)
    for event in everything:
        parts = [value for key, value in event.items() if key.startswith("loss_")]
        assert event["loss"] == pytest.approx(sum(parts), rel=1e-5)


@pytest.mark.slow
def test_pixels_cut_again_are_those_that_were_stored(tmp_path: Path) -> None:
    """The same training to the bit, without the bytes."""
    for kind in ("stored", "recut"):
        runner.run_stage(job(tmp_path / kind, toy(**{"cache.pixels": kind}), target=1))
    assert same(weights(tmp_path / "stored", "stage-1"), weights(tmp_path / "recut", "stage-1"))
    sizes = [sum(f.stat().st_size for f in (tmp_path / kind / "cache").rglob("*")) for kind in ("stored", "recut")]
    assert sizes[0] - sizes[1] > 96 * 2 * 16 * 48


@pytest.mark.parametrize(
    "changes",
    [
        {"heads.blocks": [2, 4]},
        {"decoder.share": 0.5},
        {"mask.block": 2},
        {"mask.ratio_end": 0.9},
        {"mask.distance_power": 1.0},
        {"mask.distance_start": 0.5},
        {"target.kind": "hog"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_stage_of_other_heads_or_masks_is_stale(copy: Path, changes: dict[str, object]) -> None:
    (key,) = changes
    verdict = judge_stage(Wanted(toy(**changes), RunPaths(copy)), 0)
    assert verdict.state == "stale" and key in verdict.reason


@pytest.mark.parametrize("target", ["features", "teacher"])
def test_stage_0_predicts_pixels_where_its_target_is_not_there_yet(finished: Path, tmp_path: Path, target: str) -> None:
    config = toy(**{"target.kind": target, "mask.groups": 1})
    wanted = Wanted(config, RunPaths(finished))
    assert judge_stage(wanted, 0).current
    stale = judge_stage(wanted, 1)
    assert stale.state == "stale" and f"target.kind: pixels -> {target}" in stale.reason
    runner.run_stage(job(tmp_path / "anew", config, target=0))
    assert same(weights(finished, "stage-0"), weights(tmp_path / "anew", "stage-0"))
    given = Wanted(toy(**{"target.kind": target, "heads.blocks": [2, 4]}), RunPaths(finished))
    assert "target.kind" in judge_stage(given, 0).reason, "decoders of given heads are those of their later targets"


def test_a_stage_that_has_learnt_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner.run_stage(job(tmp_path / "idle", toy(**{"train.lr": 1e-9, "train.min_lr": 0.0}), target=0))
    found = record(tmp_path / "idle", "stage-0")
    assert found["final_loss"] >= 0.98 * found["blind_losses"]["place"] > 0.5
    assert f"stage 0: its loss, {found['final_loss']:.4g}, is no lower than 98% of" in capsys.readouterr().out


def test_where_pixels_come_from_changes_the_cache_and_no_stage(copy: Path) -> None:
    wanted = Wanted(toy(**{"cache.pixels": "recut"}), RunPaths(copy))
    assert judge_stage(wanted, 1).current and wanted.cache_spec(1) != Wanted(toy(), RunPaths(copy)).cache_spec(1)


def test_masks_change_with_the_run(tmp_path: Path) -> None:
    """The share of visible tokens goes from 1/4 to 1/16 as the steps go by, the same on every arm."""
    wanted = Wanted(toy(**{"mask.ratio": 0.75, "mask.ratio_end": 0.9375}), RunPaths(tmp_path))
    how, source = sampling(wanted), LiveImages(wanted.data.train, sampling(wanted))
    assert [how.keep(progress) for progress in (0.0, 0.5, 0.99, 1.0)] == [4, 2, 1, 1]
    first, last = source.load(wanted.segments[0], 0), source.load(wanted.segments[2], wanted.segments[2].steps - 1)
    assert first.progress == 0 and last.progress == pytest.approx(1 - 1 / wanted.total_steps)


def test_a_reconstruction_shows_the_image_and_guesses_only_what_is_hidden(tmp_path: Path) -> None:
    from pipeline.work import masked_build
    from stages.train import build_model

    wanted = Wanted(toy(), RunPaths(tmp_path))
    model = build_model(masked_build(wanted, 1, cached=True), 1, "cpu")
    rows = reconstructions(model, wanted.data.val, sampling(wanted), "float32")
    assert rows is not None and rows.shape == (3, 8, 16, 16, 3) and rows.dtype == np.uint8
    masked, filled, original = rows
    grey = (masked == 128).all(axis=-1)
    assert grey.mean() == pytest.approx(0.75, abs=0.01)
    assert (masked[~grey] == original[~grey]).all() and (filled[~grey] == original[~grey]).all()
    assert (filled[grey] != original[grey]).mean() > 0.5
    again = reconstructions(model, wanted.data.val, sampling(wanted), "float32")
    assert again is not None and (again == rows).all()
    blocks = Wanted(toy(**{"mask.block": 2, "mask.ratio_end": 0.9375}), RunPaths(tmp_path))
    for progress, hidden in ((0.0, 0.75), (1.0, 0.9375)):
        rows = reconstructions(model, blocks.data.val, sampling(blocks), "float32", progress)
        squares = (rows[0] == 128).all(axis=-1).reshape(8, 2, 8, 2, 8).mean(axis=(2, 4))
        assert squares.mean() == pytest.approx(hidden, abs=0.01)
        assert progress or set(squares.ravel().round(1)) == {0.0, 1.0}, "whole squares of 2 x 2 tokens of 4 pixels"
    hog = Wanted(toy(**{"target.kind": "hog"}), RunPaths(tmp_path))
    model = build_model(masked_build(hog, 1, cached=True), 1, "cpu")
    assert reconstructions(model, hog.data.val, sampling(hog), "float32") is None


def test_a_perfect_prediction_of_pixels_looks_like_the_original() -> None:
    from models.targets import pixel_target, pixels_of

    pixels = torch.randint(0, 256, (2, 5, 48), dtype=torch.uint8)
    assert torch.equal(pixels_of(pixel_target(pixels), pixels), pixels)


def test_a_run_draws_reconstructions_for_people_and_for_tensorboard(finished: Path) -> None:
    for place in ("stage-0", "stage-2", "e2e"):
        assert (finished / "figures" / f"reconstructions-{place}.png").read_bytes().startswith(b"\x89PNG")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert "stage-2/reconstructions" in board.Tags()["images"]


def test_the_sheet_has_every_picture_in_its_row_and_column(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).permutation(200)[: 3 * 4 * 3].reshape(3, 4, 3)
    rows = np.broadcast_to(colours[:, :, None, None], (3, 4, 14, 14, 3)).astype(np.uint8)
    draw_reconstructions(rows, "stage 2", tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    centres = np.array([[np.argwhere((sheet == colour).all(-1)).mean(0) for colour in line] for line in colours])
    assert (np.diff(centres[..., 0], axis=0) > 100).all() and (np.diff(centres[..., 1], axis=1) > 100).all()
    assert np.ptp(centres[..., 0], axis=1).max() < 1 and np.ptp(centres[..., 1], axis=0).max() < 1


def test_the_plan_prices_what_is_decoded_and_where_pixels_come_from(finished: Path, tmp_path: Path) -> None:
    from pipeline.costs import choices

    found = choices(Wanted(toy(), RunPaths(finished)))
    assert found["decoder_share"].keys() == {"1.0", "0.5", "0.25"} and min(found["decoder_share"].values()) > 0
    assert found["pixels"]["stored_bytes"] == 2 * 2 * 96 * 16 * 48 and found["pixels"]["recut_seconds"] > 0
    coarse = Wanted(toy(**{"heads.blocks": [2, 4], "heads.scales": [1, 0.5]}), RunPaths(finished))
    assert choices(coarse)["decoder_share"] == {}
    assert "pixels" not in choices(Wanted(toy(**{"target.kind": "features"}), RunPaths(finished)))


def test_heads_have_names_that_files_and_plots_can_bear() -> None:
    assert [HeadSpec(2, "hog", s).name for s in (4.0, 2.0, 1.0, 0.5)] == [
        "block2_hog_x4", "block2_hog_x2", "block2_hog", "block2_hog_half",
    ]  # fmt: skip


def test_the_last_head_stands_behind_the_last_block_of_a_model_of_timm_s_too(tmp_path: Path) -> None:
    """How deep it is stands in none of the settings; blocks behind the last head would never learn, and be scored."""
    named = {"model.name": "vit_small_patch16_36x1_224", "model.depth": 0, "model.width": 0, "model.heads": 0}
    short, whole = (toy(**named | {"heads.blocks": blocks}) for blocks in ([2, 12], [2, 36]))
    with pytest.raises(ConfigError, match=r"heads.blocks = \[2, 12\] must rise to 36, the last block of vit_small"):
        runner.run_stage(job(tmp_path / "toy", short, target=0))
    assert not (tmp_path / "toy" / "stage-0").exists()
    assert [head.block for head in Wanted(whole, RunPaths(tmp_path)).heads] == [2, 36]
