"""The disk that the caches of a run take: what does not fit is refused before anything starts, and what no stage needs
any more is removed where `cache.keep=needed` asks for it. Called by the runner; counts with `budget`. Free of torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from cache.size import cache_bytes
from cache.verify import remove_cache
from pipeline.budget import course_of_disk, still_needed
from pipeline.config import ConfigError
from pipeline.decide import Wanted, judge_cache, judge_stage
from pipeline.desk import Desk
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


def refuse_what_does_not_fit(wanted: Wanted, last: int, more: Sequence[Need] = ()) -> None:
    """Raise ConfigError before anything runs when the caches that must lie on disk at the same time, those of the
    stages up to `last` and then `more`, pass `cache.budget_gb` or need more disk than is free."""
    cache = wanted.config.cache
    stages = [wanted.needs(stage) for stage in to_run(wanted) if stage <= last] + [tuple(more)]

    def size(need: Need) -> int:
        return cache_bytes(wanted.layout(need))

    had = there(wanted, more)
    most, built = course_of_disk(stages, had, size, cache.keep == "all")
    if not built:
        return
    first, final = built[0], built[-1]
    which = "finetune.views" if first.tunes else "cache.views"
    whose = "of fine-tuning" if first.tunes else f"of stages {first.stage}-{max(first.stage, final.stage)}"
    what = f"caches {whose} with {which}={first.draft.views}"
    if cache.budget_gb and most > cache.budget_gb * 1e9:
        least, _ = course_of_disk(stages, had, size, False)
        ways = [f"lower {which} or data.limit", "raise cache.budget_gb"]
        if least < most:
            ways.append(f"set cache.keep=needed ({gb(least)} GB)")
        if cache.over_budget == "refuse" and not more:
            ways.append("set cache.over_budget=live")
        raise ConfigError(
            f"{what} make it {gb(most)} GB of caches at once, cache.budget_gb = {cache.budget_gb:g}; "
            f"{', '.join(ways[:-1])} or {ways[-1]}"
        )
    needed = most - sum(map(size, had & still_needed(stages, had) if cache.keep == "needed" else had))
    root = wanted.paths.cache_root.absolute()
    free = shutil.disk_usage(next(folder for folder in (root, *root.parents) if folder.exists())).free
    if needed > free:
        raise ConfigError(
            f"{what} need {needed / 1e9:,.1f} GB, {root} has {free / 1e9:,.1f} GB free; "
            f"lower {which} or data.limit, or set CACHE_ROOT to a larger disk"
        )


def gb(size: float) -> str:
    return f"{size / 1e9:,.3g}"


def release(desk: Desk, working: Sequence[Need] = ()) -> None:
    """With `cache.keep=needed`, remove the stages' caches that no stage still to run reads or continues; `working` are
    needed besides. The cache of fine-tuning stays."""
    wanted = desk.wanted
    if wanted.config.cache.keep == "all":
        return
    on_disk = there(wanted)
    needed = still_needed([*(wanted.needs(stage) for stage in to_run(wanted)), working], on_disk)
    for need in sorted(on_disk - needed, key=lambda need: need.name):
        spec = wanted.spec(need)
        assert spec is not None, "it lies on disk"
        remove_cache(wanted.cache_folder(spec))
        desk.log.message(f"{need.name}: removed, no stage still to run needs it (cache.keep=needed)")
