"""The disk that the caches of a run take: what does not fit is refused before anything starts, and what no stage needs
any more is removed where `cache.keep=needed` asks for it. Called by the runner; counts with `budget`. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

from cache.place import free_bytes
from pipeline.budget import course_of_disk, sizes_of, still_needed
from pipeline.config import ConfigError
from pipeline.decide import Wanted
from pipeline.desk import Desk
from pipeline.needs import Need
from pipeline.remaining import there, to_run
from pipeline.sharing import claim, remove_unused, used


def refuse_what_does_not_fit(wanted: Wanted, last: int, more: Sequence[Need] = ()) -> None:
    """Raise ConfigError before anything runs when the caches that must lie on disk at the same time, those of the
    stages up to `last` and then `more`, pass `cache.budget_gb` or need more disk than is free."""
    cache = wanted.config.cache
    stages = [wanted.needs(stage) for stage in to_run(wanted) if stage <= last] + [tuple(more)]
    sizes, had = sizes_of(wanted), there(wanted, more)
    most, built = course_of_disk(stages, had, sizes, cache.keep == "all")
    held = sum(map(sizes.whole, had & still_needed(stages, had) if cache.keep == "needed" else had))
    if most <= held:
        return
    built = built or [need for needs in stages for need in needs]
    first, final = built[0], built[-1]
    which = "finetune.views" if first.tunes else "cache.views"
    whose = "of fine-tuning" if first.tunes else f"of stages {first.stage}-{max(first.stage, final.stage)}"
    what = f"caches {whose} with {which}={first.draft.views}"
    if cache.budget_gb and most > cache.budget_gb * 1e9:
        least, _ = course_of_disk(stages, had, sizes, False)
        ways = [f"lower {which} or data.limit", "raise cache.budget_gb"]
        if least < most:
            ways.append(f"set cache.keep=needed ({gb(least)} GB)")
        if cache.over_budget == "refuse" and not more and not cache.refresh:
            ways.append("set cache.over_budget=live")
        raise ConfigError(
            f"{what} make it {gb(most)} GB of caches at once, cache.budget_gb = {cache.budget_gb:g}; "
            f"{', '.join(ways[:-1])} or {ways[-1]}"
        )
    root = wanted.paths.cache_root
    free, needed = free_bytes(root), most - held
    if needed > free:
        from pipeline.begun import still_to_write

        needed = still_to_write(wanted, stages, had)
    if needed > free:
        raise ConfigError(
            f"{what} need {needed / 1e9:,.1f} GB, {root} has {free / 1e9:,.1f} GB free; "
            f"lower {which} or data.limit, or set CACHE_ROOT to a larger disk"
        )


def gb(size: float) -> str:
    return f"{size / 1e9:,.3g}"


def release(desk: Desk, working: Sequence[Need] = ()) -> None:
    """With `cache.keep=needed`, remove the stages' caches that no stage still to run reads or continues, unless another
    run uses them; `working` are needed besides. The cache of fine-tuning stays."""
    wanted = desk.wanted
    if wanted.config.cache.keep == "all":
        return
    claim(desk, working)  # what this run is done with, others may remove
    kept = used(wanted, working)
    for need in sorted(there(wanted), key=lambda need: need.name):
        spec = wanted.spec(need)
        assert spec is not None, "it lies on disk"
        folder = wanted.cache_folder(spec)
        if folder in kept:
            continue
        why = remove_unused(wanted, folder)
        told = f"kept, {why}" if why else "removed, no stage still to run needs it"
        desk.log.message(f"{need.name}: {told} (cache.keep=needed)")
