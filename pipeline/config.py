"""Every setting of a run in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import Any

from cache.config import CacheConfig
from cache.patience import StoreConfig
from models.config import DecoderConfig, HeadsConfig, MaskConfig, ModelConfig, TargetConfig, TeacherConfig
from stages.config import DataConfig, EvalConfig, FinetuneConfig, ScheduleConfig, TrainConfig


class ConfigError(ValueError):
    """A setting, recipe, file or flag is wrong; the message is one line for the user."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where the tasks that build caches run."""

    address: str = ""
    """Dask scheduler to connect to; empty starts a local cluster. Start its workers with two threads each: one computes
    a shard while the other writes the one before."""
    workers: int = 0
    """Worker processes of the local cluster; 0 keeps one worker inside this process."""
    threads: int = 0
    """Torch threads of one worker; 0 shares this machine's cores among the workers."""


@dataclass(frozen=True)
class BenchConfig:
    """What `bench` measures of the cache: written and read beside other formats, on the same random features."""

    rows: int = 256
    """Samples of (196, 768): 77 MB in float16, for each of a dozen formats."""
    rounds: int = 3
    """Rounds, in alternating order; a round more warms."""
    threads: int = 2
    """Threads that read, and torch's threads while they do; the same for all."""
    batch: int = 64
    """Rows read at once."""
    shard_rows: int = 128
    """Rows in a shard, of Permafrost and of zarr-python."""
    shards: int = 8
    """Shards that are encoded to compare with the frozen blocks alone; fewer where the data has no more."""


@dataclass(frozen=True)
class PipelineConfig:
    """Every setting of a run."""

    seed: int = 0
    """Weights, views, masks and the order of images are pure functions of this number."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    store: StoreConfig = field(default_factory=StoreConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)


def get(config: PipelineConfig, key: str) -> Any:
    """The value of a dotted setting."""
    return reduce(getattr, key.split("."), config)
