"""The work of `permafrost finetune`: a classifier on a stage's or an arm's encoder, trained by the loop of every stage,
from images or from the cache behind its frozen blocks, and the record of what came of it."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file

from cache import open_cache
from models.classifier import Classifier, build_classifier
from models.drop import DepthDrop
from models.learner import Learner
from models.vit import build_encoder
from pipeline.config import ConfigError
from pipeline.desk import Desk
from pipeline.inputs import inputs_digest
from pipeline.layout import StagePaths
from pipeline.seconds import costs_of, spent_on
from pipeline.tuned import Tuning
from pipeline.work import carry_out, file_checksum, finish_record
from stages.arm import Arm
from stages.checkpoint import CheckpointError
from stages.finetune import (
    CachedPrefix,
    FinetuneRates,
    FinetuneResult,
    Lessons,
    LiveViews,
    classify,
    layer_decay_groups,
    loop_settings,
)
from stages.labels import num_classes
from stages.optim import build_adamw
from stages.sources import Source


def finetune(desk: Desk, tuning: Tuning) -> None:
    """Fine-tune to the end and write record, model and final state. Raises Interrupted with the state saved."""
    wanted, paths, arm = tuning.wanted, tuning.wanted.paths.finetune, finetune_arm(tuning)
    spec = wanted.spec(tuning.need) if tuning.need else None
    facts: dict[str, Any] = {"from": tuning.encoder, "cut": tuning.segment.cut, "inputs": tuning.inputs()}
    facts |= {"parent": (tuning.record or {}).get("fingerprint"), "cache": spec.fingerprint if spec else None}
    facts |= costs_of([spent_on(wanted, paths, spec)] if spec else [])
    found: list[FinetuneResult] = []

    def evaluate(model: Classifier) -> FinetuneResult:
        found.append(scored(tuning, model))
        return found[-1]

    done = carry_out(desk, paths, arm, facts, evaluate)
    assert isinstance(done.model, Classifier)
    result = found[-1] if found else scored(tuning, done.model)  # stopped between its last evaluation and its end
    finish_record(paths, done, done.model.timm_state(), scores_of(result))


def finetune_arm(tuning: Tuning) -> Arm:
    """What fine-tuning trains; its encoder and its cache are there."""
    config, segment, start = tuning.wanted.config, tuning.segment, checked_start(tuning)
    settings = loop_settings(config.finetune, config.train)
    return Arm(
        tag={"arm": "finetune"},
        segments=(segment,),
        make=lambda segment: make_classifier(tuning, start),
        optimizer=lambda model: optimizer_of(tuning, model),
        train=settings,
        rates=FinetuneRates(config.finetune, segment.steps, segment.steps_per_epoch),
        source=lambda segment: source_of(tuning),
        state=tuning.wanted.paths.finetune.state,
        start=None,
        inputs=inputs_digest(tuning.inputs()),
        section="finetune",
        memory=config.cache.memory,
        eval_every=config.eval.every,
    )


def scores_of(result: FinetuneResult) -> dict[str, Any]:
    """What the record says: the head behind the last block first, then every head, and the best by name."""
    *_, last = result.heads
    heads = [{"after": head.block, "top1": head.top1, "top5": head.top5} for head in result.heads]
    return {
        "top1": last.top1,
        "top5": last.top5,
        "evaluated": result.images,
        "heads": heads,
        "best_head": result.best.block,
    }


def scored(tuning: Tuning, model: Classifier) -> FinetuneResult:
    """Accuracy on the evaluation images."""
    config = tuning.wanted.config
    batch, size = config.eval.batch_size, config.model.image_size
    return classify(model, tuning.wanted.data.val, config.eval.val_limit, batch, size, config.train.precision)


def checked_start(tuning: Tuning) -> StagePaths:
    """The files of the encoder that is started from. Raises CheckpointError when its weights were altered."""
    paths = tuning.wanted.paths.encoder(tuning.encoder)
    if not paths.model.exists() or file_checksum(paths.model) != (tuning.record or {}).get("weights"):
        raise CheckpointError(
            f"{paths.model} is not the encoder that {tuning.encoder} ended with; delete {paths.root} to train it anew"
        )
    return paths


def make_classifier(tuning: Tuning, start: StagePaths) -> Classifier:
    """The classifier on its device, its encoder's weights those of the start."""
    wanted, config = tuning.wanted, tuning.wanted.config
    asked = config.finetune
    encoder = build_encoder(config.model, config.seed)
    encoder.vit.load_state_dict(load_file(start.model))
    encoder.set_attention(config.train.device)
    classes = num_classes(wanted.data)
    model = build_classifier(encoder, classes, asked.heads, asked.freeze, asked.pool, config.seed)
    model.to(config.train.device)
    model.drop = DepthDrop(config.seed, asked.drop_path, 0.0, tuning.segment.steps, paired=asked.mixes)
    model.drop.install(encoder)
    return model


def optimizer_of(tuning: Tuning, model: Learner) -> torch.optim.Optimizer:
    """AdamW over what learns, layer by layer."""
    config = tuning.wanted.config
    assert isinstance(model, Classifier)
    groups = layer_decay_groups(model, config.finetune.weight_decay, config.finetune.layer_decay)
    return build_adamw(groups, loop_settings(config.finetune, config.train))


def source_of(tuning: Tuning) -> Source:
    """What a step reads: the cache behind the frozen blocks, or, where nothing is frozen, images."""
    wanted, config = tuning.wanted, tuning.wanted.config
    classes = num_classes(wanted.data)
    lessons = Lessons(
        seed=config.seed,
        config=config.finetune,
        data=config.data,
        image_size=config.model.image_size,
        classes=classes,
        blocks=config.cache.blocks,
        mean=config.model.mean,
        std=config.model.std,
    )
    if tuning.need is None:
        return LiveViews(wanted.data.train, lessons)
    spec = wanted.spec(tuning.need)
    if spec is None:
        raise ConfigError(f"{tuning.encoder} has to be trained first; run `make finetune`")
    return CachedPrefix(open_cache(wanted.cache_folder(spec), memory=config.cache.memory), lessons)
