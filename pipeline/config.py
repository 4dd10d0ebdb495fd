"""Every setting of a run in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Literal

from cache.config import CacheConfig
from cache.patience import StoreConfig
from models.config import DecoderConfig, HeadsConfig, MaskConfig, ModelConfig, TargetConfig, TeacherConfig
from stages.config import DataConfig, EvalConfig, FinetuneConfig, ScheduleConfig, TrainConfig


class ConfigError(ValueError):
    """A setting, recipe, file or flag is wrong; the message is one line for the user."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where sweeps over shards run: building, verifying and repairing caches, adding views, probing features."""

    kind: Literal["local", "slurm", "pbs", "kubernetes"] = "local"
    """Where workers come from: this machine, or jobs of a batch system or pods that are started for the run."""
    address: str = ""
    """Dask scheduler that runs already, such as tcp://host:8786. Start its workers with two threads each: one computes
    a shard while the other writes the one before."""
    scheduler_file: str = ""
    """The same by the file that `dask scheduler --scheduler-file` writes; read again when the scheduler is lost."""
    workers: int = 0
    """Worker processes on this machine; 0 chooses: one for each of several GPUs, or for every 8 of 16 and more cores,
    else one worker inside this process. With the other kinds, jobs or pods at first, and fewest where they adapt."""
    threads: int = 0
    """Torch threads of one worker, and the cores that a job or pod asks for; 0 shares this machine's cores."""
    adapt_to: int = 0
    """Most workers, of slurm, pbs and kubernetes, where their number follows the work; 0 keeps it."""
    ahead: int = 3
    """Tasks submitted for each thread of the cluster, running ones included; more wait in this process."""
    straggler: float = 3.0
    """A task that takes so many times as long as most is given to a second worker when one is idle, and whichever ends
    first counts; 0 is never."""
    patience: float = 300.0
    """Seconds to wait for a scheduler that was lost, or, for a job, for its scheduler."""
    memory: str = "8GB"
    """Memory of a job or pod."""
    queue: str = ""
    """Partition (slurm) or queue (pbs)."""
    account: str = ""
    """Account or project that jobs are charged to."""
    walltime: str = "01:00:00"
    """Time of a job."""
    lifetime: float = 0.0
    """Minutes after which a worker ends itself, between tasks where it can; 0 is in time before the walltime, and never
    for pods."""
    stagger: float = 4.0
    """Minutes by which lifetimes differ at random, so that not all workers go at once."""
    directives: str = ""
    """More directives of a job, separated by semicolons: `--gres=gpu:1; --constraint=a100`. For pods, more resources:
    `nvidia.com/gpu=1`."""
    prologue: str = ""
    """What a job's script does before its worker starts, separated by semicolons: `module load cuda`."""
    interface: str = ""
    """Network interface of scheduler and jobs, such as ib0."""
    image: str = ""
    """Container image of pods, with permafrost installed."""
    namespace: str = "default"
    """Kubernetes namespace."""
    volume: str = ""
    """CLAIM:PATH, the persistent volume claim that pods mount, and where; caches and images lie there."""

    @property
    def remote(self) -> bool:
        """Whether tasks leave this machine."""
        return bool(self.address or self.scheduler_file) or self.kind != "local"

    @property
    def batch(self) -> bool:
        """Whether workers are jobs of a batch system."""
        return self.kind in ("slurm", "pbs")

    @property
    def elsewhere(self) -> bool:
        """Whether other processes than this one are asked for."""
        return self.remote or self.workers > 0


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
