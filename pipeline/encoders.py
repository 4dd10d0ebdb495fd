"""Whether encoders that make the views of a ring ahead keep up with the training that reads them, as the plan foretells
it. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.decide import Wanted
from pipeline.predict import StageCost


def ring_lines(wanted: Wanted, costs: Sequence[StageCost]) -> Iterator[str]:
    """Whether encoders keep up with a stage whose views are made ahead, on cores of their own."""
    cache, cluster = wanted.config.cache, wanted.config.cluster
    for cost in costs if cache.refresh_ahead else ():
        turns = wanted.generation(wanted.parts(cost.stage)[-1], cost.stage)
        if not turns or not cost.epochs:
            continue
        view = cost.cache_seconds / (cache.views + turns)
        beside = cost.cached_seconds * cache.refresh / cost.epochs
        told = f"stage {cost.stage}: a new view takes {view:,.1f} s, training between two turns {beside:,.1f} s: "
        if not cluster.elsewhere:
            yield told + "on the same cores one slows the other, unless cluster.workers or cluster.address gives others"
        elif view > beside:
            waits = f"it waits about {view - beside:,.1f} s at each of {turns} turns"
            yield f"{told}{waits}; add workers, or raise cache.refresh"
        else:
            yield told + f"encoders keep up (cache.refresh_ahead = {cache.refresh_ahead})"
