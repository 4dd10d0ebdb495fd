"""The work that the runner has decided on: train a stage or a baseline arm, build a cache, and write down what came of
it. A record says `done` only after everything it names is on disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from cache import open_cache
from cache.layout import Layout
from cache.manifest import atomic_write
from models.learner import Learner
from models.mim import MaskedModel
from models.vit import Encoder, build_encoder, frozen_hash
from pipeline.cluster import task_runner
from pipeline.config import ConfigError, PipelineConfig
from pipeline.decide import Wanted, inputs_digest
from pipeline.desk import Desk
from pipeline.job import Interrupted, RunFailed
from pipeline.kept import forget_epochs, kept_epochs
from pipeline.layout import StagePaths
from pipeline.show import console, table
from stages.adaptive import Settle
from stages.checkpoint import CheckpointError, Progress
from stages.encode import EncodeJob, build
from stages.endings import Settling
from stages.images import spread
from stages.optim import Rates, build_optimizer, parameter_groups
from stages.pictures import reconstructions
from stages.probe import ProbeResult, evaluate
from stages.segment import Segment
from stages.sources import CachedFeatures, LiveFeatures, LiveImages, Sampling, Source
from stages.train import Arm, Build, Diverged, Hooks, build_model, train_arm
from stages.views import centre_batch


def train_stage(desk: Desk, stage: int) -> None:
    """Stage 0 trains everything from images; a later one the blocks behind its cut, from the cache."""
    wanted = desk.wanted
    how = sampling(wanted)
    if stage:
        spec = wanted.cache_spec(stage)
        assert spec is not None, "ensure_cache comes first"
        cache = open_cache(wanted.cache_folder(spec))
        source: Source = CachedFeatures(cache, how, wanted.data.train)
        built = read_seconds(wanted.paths.stage(stage), spec.fingerprint)
    else:
        source, built, spec = LiveImages(wanted.data.train, how), 0.0, None
    before = 0
    for part in wanted.asked(stage):
        if gone := [head.name for head in wanted.heads if before < head.block <= part.cut]:
            names = (f"from epoch {part.first_epoch} on " if part.in_place else "") + ", ".join(gone)
            desk.log.message(f"stage {stage}: {names} read frozen blocks and are gone, with their losses")
        before = part.cut
    train(
        desk,
        paths=wanted.paths.stage(stage),
        tag={"stage": stage},
        segments=wanted.asked(stage),
        source=lambda segment: source,
        start=state_file(wanted.paths.stage(stage - 1)) if stage else None,
        inputs=wanted.stage_inputs(stage),
        settling=settling(wanted, stage),
        facts={"cut": wanted.cut(stage), "cache": spec.fingerprint if spec else None, "cache_seconds": built},
    )


def train_baseline(desk: Desk, arm: str) -> None:
    """Both baselines go on from the end of stage 0 through all later epochs: e2e freezes nothing; freeze freezes as the
    stages do and runs the frozen blocks forward on every step."""
    wanted = desk.wanted
    segments = wanted.arm_segments(arm)
    train(
        desk,
        paths=wanted.paths.arm(arm),
        tag={"arm": arm},
        segments=segments,
        source=lambda segment: live_source(wanted, segment),
        start=state_file(wanted.paths.stage(0)),
        inputs=wanted.arm_inputs(arm),
        facts={"cut": segments[-1].cut, "cache": None, "cache_seconds": 0.0},
        freezes=arm != "e2e",
    )


def live_source(wanted: Wanted, segment: Segment) -> Source:
    """Images masked before the first block, or, where the target is made of frozen features, those features live."""
    if wanted.reads_features(segment):
        fresh = wanted.plan[-1].first_epoch + wanted.plan[-1].epochs  # as many views as epochs: each is new
        return LiveFeatures(wanted.data.train, sampling(wanted), fresh)
    return LiveImages(wanted.data.train, sampling(wanted))


def train(
    desk: Desk,
    paths: StagePaths,
    tag: dict[str, Any],
    segments: tuple[Segment, ...],
    source: Callable[[Segment], Source],
    start: Path | None,
    inputs: dict[str, Any],
    facts: dict[str, Any],
    settling: Settling | None = None,
    freezes: bool = True,
) -> None:
    """Train an arm to its end and write its record, model and final state. Raises Interrupted with the state saved."""
    wanted, config = desk.wanted, desk.wanted.config
    record = (
        tag
        | facts
        | {
            "status": "running",
            "fingerprint": inputs_digest(inputs),
            "parent": parent_of(wanted, start),
            "epochs": sum(segment.epochs for segment in segments),
            "inputs": inputs,
        }
    )
    if (wanted.record(paths) or {}).get("fingerprint") != record["fingerprint"]:
        forget_epochs(paths)
    write_record(paths, record)
    arm = Arm(
        tag=tag,
        segments=segments,
        make=lambda part: build_model(masked_build(wanted), part.cut, config.train.device, part.entry),
        optimizer=lambda model: optimizer_of(wanted, model, freezes),
        train=config.train,
        rates=rates(wanted, freezes),
        source=source,
        state=state_file(paths),
        start=start,
        inputs=record["fingerprint"],
        eval_every=config.eval.every,
        keep={epoch: paths.epoch(epoch) for epoch in kept_epochs(config.train.save_epochs, segments)},
        settling=settling,
    )
    hooks = Hooks(
        log=desk.log,
        evaluate=lambda model: evaluate_encoder(wanted, model.encoder),
        stop=desk.job.stop.is_set,
        keep=lambda path, model: write_encoder(path, model.encoder),
    )
    try:
        progress, model = train_arm(arm, hooks)
    except Diverged as error:
        write_record(paths, record | {"status": "failed"})
        raise RunFailed(str(error)) from error
    if progress.segment < len(segments):
        done = sum(totals.steps for totals in progress.totals)
        raise Interrupted(
            f"interrupted: {arm.label} is saved at step {done} of {sum(s.steps for s in segments)}; "
            "the same command goes on from there"
        )
    if progress.ended:
        desk.log.message(f"{arm.label}: ended at epoch {progress.ended['epoch']:g}, {progress.ended['why']}")
    finish_record(paths, record, progress, model, segments)
    if isinstance(model, MaskedModel):
        show_reconstructions(desk, model, paths, arm.label)


def show_reconstructions(desk: Desk, model: MaskedModel, paths: StagePaths, label: str) -> None:
    """A figure of what the decoder fills in, where it predicts pixels; also in TensorBoard."""
    from pipeline.figures import reconstructions as draw

    config = desk.wanted.config
    rows = reconstructions(model, desk.wanted.data.val, sampling(desk.wanted), config.train.precision)
    if rows is not None:
        place = paths.root.name
        draw(rows, label, desk.wanted.paths.figures / f"reconstructions-{place}.png")
        desk.log.picture(place, np.concatenate(np.concatenate(rows, axis=2), axis=0), 0)


def finish_record(
    paths: StagePaths, record: dict[str, Any], progress: Progress, model: Learner, segments: tuple[Segment, ...]
) -> None:
    """Write the encoder, then the record that says `done` and what came of it."""
    state = write_encoder(paths.model, model.encoder)
    totals, last = progress.totals, progress.curve[-1]
    seconds, images = progress.train_seconds, sum(part.images for part in totals)
    files = (paths.model, state_file(paths))
    write_record(
        paths,
        record
        | {
            "status": "done",
            "steps": sum(part.steps for part in totals),
            "images": images,
            "train_seconds": seconds,
            "loader_wait_seconds": sum(part.loader_wait_seconds for part in totals),
            "evaluate_seconds": sum(part.evaluate_seconds for part in totals),
            "images_per_second": images / seconds,
            "first_loss": totals[0].first_loss,
            "final_loss": totals[-1].mean_loss,
            "knn_top1": last["knn_top1"],
            "linear_top1": last["linear_top1"],
            "curve": progress.curve,
            "ended": progress.ended,
            **({"epochs": progress.ended["epoch"] - segments[0].first_epoch} if progress.ended else {}),
            **({"checks": progress.checks} if progress.checks else {}),
            "segments": [
                {
                    "cut": segment.cut,
                    "epochs": part.steps / segment.steps_per_epoch,
                    "images": part.images,
                    "train_seconds": part.train_seconds,
                    "images_per_second": part.images / part.train_seconds,
                }
                for segment, part in zip(segments, totals, strict=not progress.ended)
            ],
            "state": file_checksum(state_file(paths)),
            "weights": file_checksum(paths.model),
            "frozen_weights": {str(cut): frozen_hash(state, cut) for cut in range(1, model.encoder.depth + 1)},
            "files": {str(file.relative_to(paths.root)): file.stat().st_size for file in files},
        },
    )


def write_encoder(path: Path, encoder: Encoder) -> dict[str, torch.Tensor]:
    """Write an encoder under timm's parameter names; returns what was written."""
    state = {name: value.detach().cpu().contiguous() for name, value in encoder.vit.state_dict().items()}
    atomic_write(path, save(state))
    return state


def build_cache(desk: Desk, stage: int) -> None:
    """Build what is missing of the cache that a stage reads, shard by shard on the cluster."""
    wanted, config = desk.wanted, desk.wanted.config
    spec = wanted.cache_spec(stage)
    assert spec is not None, "ensure_cache trains the stage before it first"
    parent = wanted.cache_spec(stage - 1) if stage > 1 else None
    job = EncodeJob(
        folder=str(wanted.cache_folder(spec)),
        layout=Layout(spec, len(wanted.data.train), config.cache.shard_rows),
        weights=str(wanted.paths.stage(stage - 1).model.absolute()),
        model=config.model,
        data=config.data,
        index_folder=str(wanted.paths.index.absolute()),
        parent=str(wanted.cache_folder(parent)) if parent else None,
        parent_cut=parent.cut if parent else 0,
        batch=config.cache.encode_batch,
        device=config.train.device,
        threads=config.cluster.threads or max(1, config.train.threads // max(1, config.cluster.workers)),
        loader_threads=config.train.loader_threads,
    )
    paths, spent, started = (
        wanted.paths.stage(stage),
        read_seconds(wanted.paths.stage(stage), spec.fingerprint),
        time.perf_counter(),
    )
    with task_runner(config.cluster) as run:
        for done, total in build(job, wanted.data.train, run):
            seconds = spent + time.perf_counter() - started
            write_seconds(paths, spec.fingerprint, seconds)
            desk.log({"stage": stage, "cut": spec.cut, "shard": done, "shards": total, "cache_seconds": seconds})
            if desk.job.stop.is_set() and done < total:
                raise Interrupted(
                    f"interrupted: cache {stage} has {done} of {total} shards; the same command goes on from there"
                )
    seconds = spent + time.perf_counter() - started
    write_seconds(paths, spec.fingerprint, seconds)
    desk.log.message(f"cache {stage}: built in {seconds:.1f} s ({wanted.cache_folder(spec)})")


def evaluate_encoder(wanted: Wanted, encoder: Encoder) -> ProbeResult:
    """kNN and linear probe of an encoder, as the settings ask."""
    config = wanted.config
    size, device, precision = config.model.image_size, config.train.device, config.train.precision
    return evaluate(encoder, wanted.data, config.eval, size, device, precision)


def sampling(wanted: Wanted) -> Sampling:
    config = wanted.config
    return Sampling(
        seed=config.seed,
        batch_size=config.train.batch_size,
        data=config.data,
        model=config.model,
        mask=config.mask,
        heads=wanted.heads,
        share=config.decoder.share,
        total_steps=wanted.total_steps,
    )


def masked_build(wanted: Wanted) -> Build:
    """What makes the masked model of any stage or arm."""
    config = wanted.config
    return Build(config.seed, config.model, config.decoder, wanted.heads)


def optimizer_of(wanted: Wanted, model: Learner, freezes: bool = True) -> torch.optim.Optimizer:
    """The optimiser of what a model lets learn."""
    train = wanted.config.train
    return build_optimizer(parameter_groups(model, train.weight_decay, rates(wanted, freezes).by_layer), train)


def rates(wanted: Wanted, freezes: bool = True) -> Rates:
    """The learning rates of the run; where nothing freezes, as in the e2e arm, all layers follow the plain schedule."""
    config: PipelineConfig = wanted.config
    return Rates(
        train=config.train,
        schedule=config.schedule,
        num_blocks=wanted.identity["depth"],
        total_steps=wanted.total_steps,
        steps_per_epoch=wanted.steps_per_epoch,
        stage_starts=tuple(segment.first_step for segment in wanted.segments),
        freezes=freezes,
    )


def settling(wanted: Wanted, stage: int) -> Settling | None:
    """What an adaptive stage watches; None where its length is given, or no candidate is left."""
    schedule, images = wanted.config.schedule, wanted.data.train
    if not wanted.adaptive or stage + 1 >= len(schedule.cuts):
        return None
    return Settling(
        rule=Settle(schedule.settle_metric, schedule.settle_below, schedule.settle_checks),
        cut=schedule.cuts[stage + 1],
        every=schedule.check_every,
        images=torch.from_numpy(
            centre_batch(images, spread(len(images), schedule.probe_images), wanted.config.model.image_size)
        ),
    )


def state_file(paths: StagePaths) -> Path:
    """The state that a resume goes on from, and, once finished, that the next stage starts from."""
    return paths.last / "state.safetensors"


def parent_of(wanted: Wanted, start: Path | None) -> str | None:
    """The fingerprint of the stage whose state is started from. Raises CheckpointError when that file was altered."""
    if start is None:
        return None
    record = wanted.record(StagePaths(start.parents[1]))
    assert record is not None, "the stage before is trained first"
    if not start.exists() or file_checksum(start) != record["state"]:
        raise CheckpointError(
            f"{start} is not the state that its stage ended with; delete {start.parents[1]} to train it anew"
        )
    return str(record["fingerprint"])


def file_checksum(path: Path) -> str:
    """sha256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_record(paths: StagePaths, record: dict[str, Any]) -> None:
    paths.root.mkdir(parents=True, exist_ok=True)
    atomic_write(paths.json, (json.dumps(record, indent=2) + "\n").encode())


def read_seconds(paths: StagePaths, fingerprint: str) -> float:
    """What the stage's cache has cost to build so far, in seconds, over all interruptions."""
    file = paths.root / "cache.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    return float(record["seconds"]) if record.get("fingerprint") == fingerprint else 0.0


def write_seconds(paths: StagePaths, fingerprint: str, seconds: float) -> None:
    paths.root.mkdir(parents=True, exist_ok=True)
    atomic_write(paths.root / "cache.json", json.dumps({"fingerprint": fingerprint, "seconds": seconds}).encode())


def probe_again(wanted: Wanted, names: list[str]) -> None:
    """Print the scores of the encoders that are there, by name. Raises ConfigError when none is."""
    rows = table("encoder", "kNN", "linear", "effective rank", "feature std")
    for name in names:
        kind, _, which = name.partition(" ")
        paths = wanted.paths.stage(int(which)) if kind == "stage" else wanted.paths.arm(which)
        if paths.model.exists():
            torch.set_num_threads(wanted.config.train.threads)
            encoder = build_encoder(wanted.config.model, wanted.config.seed)
            encoder.vit.load_state_dict(load_file(paths.model))
            found = evaluate_encoder(wanted, encoder.to(wanted.config.train.device))
            scores = (found.knn_top1, found.linear_top1, found.effective_rank, found.feature_std)
            rows.add_row(name, *("-" if score is None else f"{score:.3f}" for score in scores))
    if not rows.row_count:
        raise ConfigError(
            f"{wanted.paths.root} has no trained {' or '.join(names)}; run `make all` or `make stage-0` first"
        )
    console().print(rows)
