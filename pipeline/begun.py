"""What a run will still write to the disk, where some of its caches are half built, can link what a finished cache
beside them has, or have lost nothing but their manifest. Asked where the whole of them would not fit, since looking
takes a while."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from cache.begun import Begun, begun
from cache.verify import lacks_manifest_only
from pipeline.budget import course_of_disk, sizes_of, still_needed
from pipeline.decide import Wanted
from pipeline.needs import Need
from pipeline.remaining import first_to_run


def still_to_write(wanted: Wanted, stages: Sequence[Sequence[Need]], had: Collection[Need]) -> int:
    """The most bytes at once that stages, the caches of each given, will add to what lies on disk now; `had` are the
    caches that are finished."""
    sizes, keep_all = sizes_of(wanted), wanted.config.cache.keep == "all"
    first = first_to_run(wanted)  # what encoders that are trained again make, other folders will have
    known = [need for need in still_needed(stages, ()) - set(had) if need.after < first and wanted.spec(need)]
    back = {need for need in known if lacks_manifest_only(folder_of(wanted, need))}
    parts = {need: begun_of(wanted, need) for need in known if need not in back}
    closer = replace(
        sizes,
        whole=lambda need: sizes.whole(need) - (parts[need].linked if need in parts else 0),
        begun={need: part.written for need, part in parts.items()},
    )
    there = {*had, *back}
    most, _ = course_of_disk(stages, there, closer, keep_all)
    kept = there if keep_all else there & still_needed(stages, there)
    return most - sum(map(sizes.whole, kept)) - sum(closer.begun.values())


def folder_of(wanted: Wanted, need: Need) -> Path:
    spec = wanted.spec(need)
    assert spec is not None, "its encoder is there"
    return wanted.cache_folder(spec)


def begun_of(wanted: Wanted, need: Need) -> Begun:
    """How far a cache is whose encoder is there."""
    spec, images = wanted.spec(need), wanted.data.train
    assert spec is not None, "its encoder is there"
    layout = replace(wanted.layout(need), spec=spec)
    return begun(
        wanted.cache_folder(spec), layout, kin_of(wanted, need), images.labels, images.keys, images.digests
    )


def kin_of(wanted: Wanted, need: Need) -> str:
    """The kin of a cache whose encoder is there, built or not."""
    spec = wanted.spec(need)
    assert spec is not None, "its encoder is there"
    return spec.kin(kin_of(wanted, need.parent) if need.parent else "")
