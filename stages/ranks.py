"""Several processes that train one arm together, started by torchrun: each takes its rows of every batch, and
gradients are averaged by DDP, or weights are sharded by FSDP2 where a model does not fit. The batches are those of one
process, so that the number of ranks is no part of what a run is: it stops with two and goes on with one. The training
loop's side is `team`; who starts and ends the ranks is `pipeline.crew`.

What ranks tell each other beside gradients goes over a gloo group of its own, which waits as long as the leader needs
(a cache may take hours) and which breaks at once when a process dies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from cache.rank import Rank
from cache.store import CacheReader
from models.learner import Learner
from models.spec import digest
from stages.checkpoint import whole_tensor
from stages.config import TrainConfig
from stages.finetune import CachedPrefix, LiveViews
from stages.sources import CachedFeatures, LiveFeatures, LiveImages, Source
from stages.team import RanksDiffer, Team

T = TypeVar("T")

PATIENCE = timedelta(days=365)
"""How long ranks wait for the leader. A rank that dies is noticed by its closed connection, not by the clock."""


class Pass(nn.Module):
    """All of a micro-batch that weights take part in, as one module: the embedding of live training is in `mask`."""

    def __init__(self, model: Learner) -> None:
        super().__init__()
        self.model = model

    def forward(self, source: Source, micro: Any) -> tuple[Any, Tensor]:
        batch = source.mask(self.model, micro)
        return batch, self.model(batch)


class Ranks(Team):
    """One rank of several. Every method is called by all of them, in the same order.

    local: the ranks on this machine, which share its threads. The default process group is there.
    """

    def __init__(self, rank: Rank, local: int = 1) -> None:
        self.rank, self.local = rank, local
        self.busy = False
        """Whether all ranks are training, so that none waits for an order."""
        self._control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=PATIENCE))
        self._asked: tuple[Tensor, Any] | None = None
        self._pass: DistributedDataParallel | FSDPModule | None = None

    def leave(self) -> None:
        """Close all connections: whoever waits for this rank finds them broken, at once. The last thing it is asked."""
        del self._control, self._asked, self._pass
        dist.destroy_process_group()

    def threads(self, asked: int) -> int:
        return max(1, asked // self.local)

    @contextmanager
    def assembled(self, order: Mapping[str, Any]) -> Iterator[None]:
        if self.leads:  # the others have heard it
            self.told(order)
        self.busy = True
        yield
        self.busy = False

    def take(self, model: Learner, train: TrainConfig) -> None:
        if model.drop is not None:
            model.drop = replace(model.drop, rank=self.rank.rank, ranks=self.rank.ranks)
            model.drop.install(model.encoder)
        self.sharded = train.parallel == "fsdp"
        if self.sharded:
            self._pass = shard(model, train.device)
            return
        self._pass = DistributedDataParallel(
            Pass(model), find_unused_parameters=model.idles, gradient_as_bucket_view=True
        )

    def source(self, make: Callable[[], Source], parts: int) -> Source:
        made = make() if self.leads else None
        self.told(None)
        made = make() if made is None else made
        self.same("cache", [content_of(cache) for cache in caches_of(made)])
        return of_rank(made, self.rank, parts)

    def forward(self, model: Learner, source: Source, micro: Any) -> tuple[Any, Tensor]:
        assert isinstance(self._pass, nn.Module), "take comes first"
        found: tuple[Any, Tensor] = self._pass(source, micro)
        return found

    def summing(self, last: bool) -> AbstractContextManager[None]:
        if isinstance(self._pass, FSDPModule):
            self._pass.set_requires_gradient_sync(last)
        elif not last:
            assert isinstance(self._pass, DistributedDataParallel)
            return self._pass.no_sync()
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed)
        return summed / self.rank.ranks

    def agreed(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """What the ranks asked for one step ago: the answer has travelled while this step ran, and nobody waits."""
        before = self._asked
        flags = torch.tensor([stop, save and self.leads], dtype=torch.int32)
        work = dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._control, async_op=True)
        self._asked = (flags, work)
        if before is None:
            return False, False
        before[1].wait()
        stops, saves = before[0].tolist()
        return bool(stops), bool(saves)

    def told(self, value: T) -> T:
        said = [value]
        dist.broadcast_object_list(said, src=0, group=self._control)
        return said[0]

    def same(self, what: str, value: object) -> None:
        found: list[Any] = [None] * self.rank.ranks
        dist.all_gather_object(found, value, group=self._control)
        for rank, theirs in enumerate(found):
            if theirs != found[0]:
                raise RanksDiffer(
                    f"rank {rank} has another {what} than rank 0 ({theirs} against {found[0]}); let all ranks see the "
                    "same files and settings, then call again"
                )

    def same_weights(self, what: str, model: Learner) -> None:
        """By sums of the bits of every parameter. Of sharded weights there is only one copy."""
        if not self.sharded:
            parts = [bits(parameter.detach()) for parameter in model.parameters() if parameter.requires_grad]
            self.same(what, torch.stack(parts).tolist() if parts else [])

    def whole(self, model: Learner, make: Callable[[], Learner]) -> Learner | None:
        if not self.sharded:
            return model if self.leads else None
        state: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():  # one tensor at a time is whole where it is not kept
            found = whole_tensor(value)
            if self.leads:
                state[name] = found
        if not self.leads:
            return None
        plain = make()
        plain.load_state_dict(state)
        return plain


def shard(model: Learner, device: str) -> FSDPModule:
    """Spread the weights of a model over the ranks: block by block, head by head, and what is left together."""
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    heads = [module for name, module in model.named_children() if name == "heads"]
    for part in [*model.encoder.vit.blocks, *(head for each in heads for head in each.children())]:
        fully_shard(part, mesh=mesh)
    return fully_shard(Pass(model), mesh=mesh)


def bits(values: Tensor) -> Tensor:
    """int64: the sum of float32 values read as whole numbers."""
    return values.contiguous().view(torch.int32).sum(dtype=torch.int64)


def caches_of(source: Source) -> list[CacheReader]:
    """The caches that a source reads."""
    if isinstance(source, CachedFeatures):
        return [source.cache, *source.teachers.values()]
    return [source.cache] if isinstance(source, CachedPrefix) else []


def content_of(cache: CacheReader) -> str:
    """What a cache is and, by the checksums of its files, what it holds; both short."""
    manifest = cache.manifest
    held = digest({entry.name: entry.checksum for entry in manifest.shards})
    return f"{manifest.fingerprint[:8]}, holding {held[:8]}"


def of_rank(source: Source, rank: Rank, parts: int) -> Source:
    """The source that loads one rank's rows of every step."""
    if isinstance(source, LiveImages | CachedFeatures | LiveFeatures):
        return replace(source, sampling=replace(source.sampling, rank=rank, parts=parts))
    assert isinstance(source, LiveViews | CachedPrefix), f"{type(source)} does not know of ranks"
    return replace(source, lessons=replace(source.lessons, rank=rank))
