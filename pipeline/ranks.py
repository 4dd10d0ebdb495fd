"""Which of several processes of one call this is, as torchrun's environment tells it, and what several cannot do. Free
of torch: a call of one process asks no more than whether it is one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping

from cache.rank import ALONE, Rank
from pipeline.config import ConfigError, PipelineConfig

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, and whoever starts ranks in its place, sets for each of them."""

TRAINING = ("all", "stage", "arm", "finetune")
"""Verbs in which all ranks work; of any other the first does everything."""


def rank_here(environment: Mapping[str, str] = os.environ) -> Rank:
    """This process among those of its call."""
    if not all(environment.get(name) for name in VARIABLES):
        return ALONE
    return Rank(int(environment["RANK"]), int(environment["WORLD_SIZE"]))


def local_rank(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process among the ranks of its machine, and how many those are."""
    rank = rank_here(environment)
    return int(environment.get("LOCAL_RANK", rank.rank)), int(environment.get("LOCAL_WORLD_SIZE", rank.ranks))


def refuse_what_ranks_cannot(config: PipelineConfig, verb: str, ranks: int) -> None:
    """Raises ConfigError where so many ranks cannot share what is asked for."""
    for problem in rank_problems(config, verb, ranks):
        raise ConfigError(problem)


def rank_problems(config: PipelineConfig, verb: str, ranks: int) -> Iterator[str]:
    train, finetune = config.train, config.finetune
    parts = {"train": (train.batch_size, train.accumulate, 1)}
    if verb == "finetune":
        parts["finetune"] = (finetune.batch_size, finetune.accumulate, 2 if finetune.mixes else 1)
    for section, (batch, accumulate, images) in parts.items():
        if batch % (ranks * accumulate * images):
            what = " in pairs of images" if images == 2 else ""
            each = f" and {section}.accumulate = {accumulate}" if accumulate > 1 else ""
            yield (
                f"{section}.batch_size = {batch} does not divide among {ranks} ranks{each}{what}; use a multiple of "
                f"{ranks * accumulate * images}, or another --nproc-per-node"
            )
    if train.device.startswith("cuda:"):
        yield f"train.device = {train.device} is one GPU for {ranks} ranks; use train.device=cuda, one for each"
    if train.parallel == "fsdp" and train.compile == "on":
        yield "train.compile = on with train.parallel = fsdp compiles what is gathered block by block; use compile=off"


def on_own_device(config: PipelineConfig, number: int) -> PipelineConfig:
    """The settings of a rank: its own GPU of the machine."""
    if config.train.device != "cuda":
        return config
    return dataclasses.replace(config, train=dataclasses.replace(config.train, device=f"cuda:{number}"))
