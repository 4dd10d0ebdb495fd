"""What of a run is still to be done, and therefore which of its caches are needed: for refusing what does not fit, for
removing what is not needed, and for telling other runs which caches this one uses. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.budget import still_needed
from pipeline.decide import Wanted, judge_cache, judge_stage
from pipeline.needs import Need


def first_to_run(wanted: Wanted) -> int:
    """The first stage that is not current: it and all later ones are still to run."""
    stages = (stage for stage in range(wanted.candidates) if not judge_stage(wanted, stage).current)
    return next(stages, wanted.candidates)


def to_run(wanted: Wanted) -> list[int]:
    """The stages still to run that may read caches."""
    stages = range(max(1, first_to_run(wanted)), wanted.candidates)
    return [stage for stage in stages if not wanted.used_up(stage)]


def there(wanted: Wanted, more: Sequence[Need] = ()) -> set[Need]:
    """The caches that lie on disk, of all stages and `more`, made by encoders that will not be trained again."""
    named = {need for stage in range(1, wanted.candidates) for need in wanted.needs(stage)} | set(more)
    first = first_to_run(wanted)
    return {need for need in named if need.after < first and judge_cache(wanted, need).current}


def needed_now(wanted: Wanted, working: Sequence[Need] = ()) -> set[Need]:
    """The caches that the stages still to run, and whoever is `working`, read or continue."""
    return still_needed([*(wanted.needs(stage) for stage in to_run(wanted)), working], there(wanted, working))
