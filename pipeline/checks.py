"""Combinations of settings of probes and fine-tuning that make no sense, told in one line each. `config.check` refuses
a run whose settings have any; the checks of pre-training are beside it. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from models.config import SIZES

if TYPE_CHECKING:
    from pipeline.config import PipelineConfig


def probe_problems(config: PipelineConfig) -> Iterator[str]:
    evaluation = config.eval
    if not evaluation.probes:
        yield "eval.probes is empty; name at least one of knn, logistic, sgd, lars, attentive"
    for name in ("probe_rates", "lars_rates", "attentive_rates"):
        rates = list(getattr(evaluation, name))
        if not rates or not all(0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
            yield f"eval.{name} = {rates} is no list of different rates above 0; write for example [0.03,0.1,0.3]"


def finetune_problems(config: PipelineConfig) -> Iterator[str]:
    finetune = config.finetune
    if finetune.batch_size % finetune.accumulate:
        parts = f"finetune.accumulate = {finetune.accumulate}"
        yield f"finetune.batch_size = {finetune.batch_size} is not divisible by {parts}; change either"
    if finetune.batch_size % 2 and (finetune.mixup or finetune.cutmix):
        yield (
            f"finetune.batch_size = {finetune.batch_size} is odd, but mixing pairs the images of a batch; make it "
            "even, or set finetune.mixup=0 finetune.cutmix=0"
        )
    if finetune.min_lr > finetune.lr:
        yield f"finetune.min_lr = {finetune.min_lr} is above finetune.lr = {finetune.lr}; lower finetune.min_lr"
    heads, depth = list(finetune.heads), config.model.depth or SIZES.get(config.model.name, (0, 0))[1]
    first = max(1, finetune.freeze)
    if sorted(set(heads)) != heads or any(head < first for head in heads):
        yield f"finetune.heads = {heads} does not rise from finetune.freeze = {finetune.freeze} or 1 on; write [6,9,12]"
    if depth and finetune.freeze > depth:
        yield f"finetune.freeze = {finetune.freeze} is more than the {depth} blocks there are; lower it"
    if depth and heads and heads[-1] > depth:
        yield f"finetune.heads = {heads} has more than the {depth} blocks there are; use 1..{depth}"
