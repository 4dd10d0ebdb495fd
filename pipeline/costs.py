"""`permafrost plan`: what would run, how long it would take, what it would put on disk and hold in memory, when the
caches have paid for themselves, which of them deserve their disk, and which settings would be faster or smaller. Of
a run that is here steps and caches are measured in a few seconds; with `--images` or `--device-profile` of one that
is not, `predict` has a device profile to go by. Both come out of the same code."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from cache.config import Codec
from cache.errors import CacheError
from cache.manifest import atomic_write
from cache.place import free_bytes
from cache.size import cache_bytes
from models.config import IMAGE_TARGETS
from pipeline.budget import budget_lines, course_of_disk, sizes_of
from pipeline.choice import LEAK, events_of, recommended, selection_lines, variants
from pipeline.config import ConfigError, PipelineConfig
from pipeline.decide import Wanted, judge_stage, new_needs
from pipeline.disk import refuse_what_does_not_fit
from pipeline.encoders import ring_lines
from pipeline.feeds import sampling
from pipeline.foretold import made_of
from pipeline.freezing import event_costs, show_adaptive, show_events
from pipeline.job import Job
from pipeline.memory import refuse_too_little_memory
from pipeline.predict import ARMS, OnProfile, StageCost, money, on_paper, stage_costs, totals
from pipeline.profile import DeviceProfile, read_profile
from pipeline.remaining import there
from pipeline.scratch import disk_folder
from pipeline.show import console, table
from stages.views import image_batch


def show_plan(job: Job) -> None:
    """Measure or take a profile, predict, print, and write plan.json."""
    if job.images or job.device_profile:
        show_elsewhere(job)
    else:
        make_plan(Wanted(job.config, job.paths), show=True)


def make_plan(wanted: Wanted, show: bool = False) -> dict[str, Any]:
    """The plan of a run that is here, by what steps and caches take on this machine; writes and returns plan.json."""
    from pipeline.gauge import measure_profile
    from pipeline.rehearse import rehearse

    wanted.refuse_targets_of_later_stages()
    refuse_too_little_memory(wanted, wanted.candidates - 1)
    refuse_what_does_not_fit(wanted, wanted.candidates - 1)
    folder = disk_folder(wanted)
    prices = rehearse(wanted, measure_profile(wanted, folder, wanted.data.train, room(wanted)))
    states = [judge_stage(wanted, stage).state for stage in range(len(wanted.segments))]
    costs = stage_costs(wanted, prices, states)
    found = planned(wanted, prices.profile, costs)
    found |= advice(wanted, prices.profile, costs, scales(wanted, prices.profile, costs))
    found |= choices(wanted) if len(costs) > 1 else {}
    found |= {"profile": prices.profile.to_dict(), "of": made_of(wanted)}
    found["freeze_events"] = [asdict(event) for event in event_costs(wanted)]
    if show:
        show_costs(wanted, prices.profile, costs, found)
        show_events(wanted)
        show_adaptive(wanted)
        show_advice(found)
    atomic_write(wanted.paths.plan, (json.dumps(found, indent=2) + "\n").encode())
    return found


def show_elsewhere(job: Job) -> None:
    """The plan of a run over images, or on a device, that are not here; writes <run>/plan-<device>-<images>.json."""
    here = Wanted(job.config, job.paths)
    images = job.images or len(here.data.train)
    batch = job.config.train.batch_size
    if images < batch:
        raise ConfigError(f"--images {images} is less than a batch, train.batch_size = {batch}; lower it or raise that")
    if job.device_profile:
        profile = read_profile(job.device_profile)
        wanted = on_paper(on_device(job.config, profile), images)
    else:
        from pipeline.gauge import measure_profile

        wanted = on_paper(job.config, images)
        profile = measure_profile(wanted, disk_folder(here), None, free_bytes(here.paths.cache_root))
    wanted.refuse_targets_of_later_stages()
    costs = stage_costs(wanted, OnProfile(wanted, profile))
    found = planned(wanted, profile, costs) | advice(wanted, profile, costs, (1.0, 1.0))
    found |= {"codecs": codec_bytes(wanted)} if len(costs) > 1 else {}
    found |= {"profile": profile.to_dict(), "images": images}
    out = console()
    out.print(f"{images:,} images on {profile.name}: {profile.device} ({profile.origin})", markup=False)
    show_costs(wanted, profile, costs, found)
    show_advice(found)
    for line in (*profile.assumptions, *shortened(wanted)):
        out.print(f"assumed: {line}", markup=False)
    file = job.paths.root / f"plan-{Path(job.device_profile).stem or 'here'}-{images}.json"
    job.paths.root.mkdir(parents=True, exist_ok=True)
    atomic_write(file, (json.dumps(found, indent=2) + "\n").encode())
    out.print(f"written: {file}", markup=False)


def shortened(wanted: Wanted) -> tuple[str, ...]:
    """A line where `train.max_steps` ends stages before their epochs, while caches are planned whole."""
    most = wanted.config.train.max_steps
    if all(segment.steps == segment.epochs * segment.steps_per_epoch for segment in wanted.segments):
        return ()
    return (f"train.max_steps = {most} ends stages before their epochs do; SET=train.max_steps=0 plans whole epochs.",)


def on_device(config: PipelineConfig, profile: DeviceProfile) -> PipelineConfig:
    """The settings as they would be resolved on a profile's device: a GPU trains in bfloat16."""
    if profile.busy_cores:
        return replace(config, train=replace(config.train, device="cpu", threads=profile.busy_cores))
    return replace(config, train=replace(config.train, device="cuda", precision="bfloat16"))


def planned(wanted: Wanted, profile: DeviceProfile, costs: Sequence[StageCost]) -> dict[str, Any]:
    """The stages, and the run as a whole, as plan.json holds them."""
    found = {"stages": [cost.to_dict(profile) for cost in costs]} | totals(costs)
    needs = [wanted.needs(stage) for stage in range(1, len(wanted.segments))]
    most, _ = course_of_disk(needs, (), sizes_of(wanted), wanted.config.cache.keep == "all")
    found["disk_peak_bytes"] = most
    if profile.price_per_hour:
        found["money"] = {"currency": profile.currency} | {
            arm: sum(money(cost.seconds(arm), profile) for cost in costs) for arm in ARMS
        }
    return found


def scales(wanted: Wanted, profile: DeviceProfile, costs: Sequence[StageCost]) -> tuple[float, float]:
    """Measured over modelled seconds of cached training and of building, by which advice is corrected."""
    modelled = stage_costs(wanted, OnProfile(wanted, profile))
    pairs = []
    for key in ("cached_seconds", "cache_seconds"):
        model, measured = (sum(getattr(cost, key) for cost in some) for some in (modelled, costs))
        pairs.append(measured / model if model and measured else 1.0)
    return pairs[0], pairs[1]


def advice(
    wanted: Wanted, profile: DeviceProfile, costs: Sequence[StageCost], corrected: tuple[float, float]
) -> dict[str, Any]:
    """Which freeze events deserve a cache, and which settings would be faster or smaller; nothing of an adaptive run,
    whose stages nobody knows before."""
    if len(costs) < 2 or wanted.adaptive:
        return {}
    budget = disk_budget(wanted, profile)
    events = events_of(wanted, profile, corrected)
    selection = events.select(budget)
    bar = totals(costs)["freeze_seconds"]
    rows = recommended(variants(wanted, profile, corrected), budget, bar)
    return {
        "advice": {
            "budget_bytes": budget,
            "caches": [events.marks[event - 1].cut for event in selection.chosen],
            "caches_told": list(selection_lines(wanted, events, selection, budget)),
            "settings": [{"why": why} | asdict(one) for why, one in rows],
        }
    }


def disk_budget(wanted: Wanted, profile: DeviceProfile) -> float:
    """Bytes that caches may take: cache.budget_gb, else the disk of the profile, which measured here is what is free
    and what the run's caches have of it already."""
    if wanted.config.cache.budget_gb:
        return wanted.config.cache.budget_gb * 1e9
    return profile.disk_gb * 1e9


def room(wanted: Wanted) -> float:
    """Bytes for the run's caches where they lie: what is free, and what those that are there have of it already."""
    return free_bytes(wanted.paths.cache_root) + sum(map(sizes_of(wanted).whole, there(wanted)))


# --- printing ---------------------------------------------------------------------------------------------------------


def show_costs(
    wanted: Wanted, profile: DeviceProfile, costs: Sequence[StageCost], found: dict[str, Any]
) -> None:
    """The table of stages, the totals, and what they take."""
    heads = ["stage", "cut", "epochs", "state", "e2e s", "freeze s", "cached s", "cache s", "cache on disk"]
    heads += ["e2e mem", "cached mem", "build mem"]
    priced = bool(profile.price_per_hour)
    heads += [f"e2e {profile.currency}", f"cached {profile.currency}"] if priced else []
    rows = table(*heads)
    for cost in costs:
        rows.add_row(
            *(str(cost.stage), str(cost.cut), f"{cost.epochs:g}", cost.state),
            *(f"{s:,.0f}" for s in (cost.e2e_seconds, cost.freeze_seconds, cost.cached_seconds, cost.cache_seconds)),
            f"{cost.cache_bytes / 1e6:,.0f} MB" if cost.cache_bytes else "live" if cost.live else "",
            *(
                f"{size / 1e9:.2f} GB" if size else ""
                for size in (cost.e2e_memory_bytes, cost.cached_memory_bytes, cost.build_memory_bytes)
            ),
            *(f"{money(cost.seconds(arm), profile):,.2f}" for arm in ("e2e", "cached") if priced),
        )
    out = console()
    out.print(rows)
    out.print(plan_line(found))
    waits = {arm: [str(cost.stage) for cost in costs if arm in cost.waits] for arm in ARMS}
    if told := [f"{arm} at stage {', '.join(stages)}" for arm, stages in waits.items() if stages]:
        threads = wanted.config.train.loader_threads
        more = f"raise train.loader_threads, now {threads}" if threads < profile.cores else f"all {threads} cores load"
        out.print(f"loading bounds {'; '.join(told)}; {more}")
    if found["disk_peak_bytes"] > profile.disk_gb * 1e9:
        needed = f"{found['disk_peak_bytes'] / 1e9:,.0f} GB"
        out.print(f"caches take {needed} at once, the disk has {profile.disk_gb:,.0f} GB; see what would be smaller")
    memory = max(found["memory_bytes"].values())
    if memory > profile.memory_gb * 1e9:
        out.print(
            f"a step takes about {memory / 1e9:.1f} GB, the device has {profile.memory_gb:g} GB; raise train.accumulate"
        )
    if priced:
        spent = ", ".join(f"{arm} {found['money'][arm]:,.2f}" for arm in ARMS)
        out.print(f"money at {profile.price_per_hour:g} {profile.currency} an hour: {spent}")
    if len(costs) > 1:
        for line in (*budget_lines(wanted), *ring_lines(wanted, costs)):
            out.print(line)


def plan_line(found: dict[str, Any]) -> str:
    """The run as a whole in a line."""
    even = found["break_even_epoch"]
    return (
        f"total: e2e {found['e2e_seconds']:,.0f} s, freeze {found['freeze_seconds']:,.0f} s, "
        f"cached {found['cached_seconds']:,.0f} s with caches; speed-up {found['speedup_total']:.2f}; break-even "
        + ("not reached" if even is None else f"at epoch {even:.1f}")
        + f"; disk {found['cache_bytes'] / 1e6:,.0f} MB, at once {found['disk_peak_bytes'] / 1e6:,.0f} MB"
    )


def show_advice(found: dict[str, Any]) -> None:
    """What would be fastest and smallest, which caches pay, what other choices cost."""
    out, told = console(), found.get("advice")
    if told:
        for line in told["caches_told"]:
            out.print(line, markup=False)
        rows = table("what would be", "cached s", "caches at once", "groups", "codec", "views", "SET")
        for row in told["settings"]:
            rows.add_row(
                *(row["why"], f"{row['seconds']:,.0f}", f"{row['bytes'] / 1e6:,.0f} MB"),
                *(str(row["groups"]) + (" (leaks)" if row["groups"] == 1 else ""), row["codec"], str(row["views"])),
                f'"{row["words"]}"' if row["words"] else "",
            )
        out.print(rows)
        if any(row["groups"] == 1 for row in told["settings"]):
            out.print(LEAK)
    for line in price_lines(found):
        out.print(line)


# --- what single settings would cost ----------------------------------------------------------------------------------


SHARES = (1.0, 0.5, 0.25)


def choices(wanted: Wanted) -> dict[str, Any]:
    """What two settings would cost otherwise, measured at the last cut.

    `decoder_share`: seconds of a cached step by the share of hidden tokens decoded; empty where a head needs all.
    `pixels`: bytes of storing the pixels that image targets need, all caches, and seconds of cutting one image again.
    """
    from pipeline.gauge import step_seconds

    config, last = wanted.config, len(wanted.segments) - 1
    found: dict[str, Any] = {"decoder_share": {}}
    if all(head.scale >= 1 for head in wanted.heads):
        for share in SHARES:
            other = Wanted(replace(config, decoder=replace(config.decoder, share=share)), wanted.paths)
            found["decoder_share"][str(share)] = step_seconds(other, last, other.parts(last)[-1], "cached")
    found["codecs"] = codec_bytes(wanted)
    if sampling(wanted).targets(wanted.segments[last]) & set(IMAGE_TARGETS):
        values = config.model.num_tokens * config.model.patch_values
        rows = np.arange(min(RECUT_IMAGES, len(wanted.data.train)))
        size = config.model.image_size
        started = time.perf_counter()
        image_batch(wanted.data.train, rows, 0, config.data, size, config.seed)
        seconds = (time.perf_counter() - started) / len(rows)
        found["pixels"] = {
            "stored_bytes": last * config.cache.views * len(wanted.data.train) * values,
            "recut_seconds": seconds,
        }
    return found


RECUT_IMAGES = 64


def codec_bytes(wanted: Wanted) -> dict[str, int]:
    """Bytes of all caches of the stages by the codec of all of them, without a filter; exact but for metadata. A codec
    that does not fit the model is left out."""
    found, cache = {}, wanted.config.cache
    for codec in get_args(Codec):
        other = replace(cache, codec=codec, later_codec="", filter="none", over_budget="refuse")
        with suppress(CacheError):
            run = replace(wanted, config=replace(wanted.config, cache=other))
            needs = [need for stage in range(1, len(run.segments)) for need in new_needs(run, stage)]
            found[codec] = sum(cache_bytes(run.layout(need)) for need in needs)
    return found


def price_lines(prices: dict[str, Any]) -> Iterator[str]:
    """The choices as people read them."""
    if shares := prices.get("decoder_share"):
        steps = ", ".join(
            f"{share} {1e3 * seconds:.0f} ms ({shares['1.0'] / seconds:.2f}×)" for share, seconds in shares.items()
        )
        yield f"a cached step at the last cut by decoder.share: {steps}"
    if codecs := prices.get("codecs"):
        sizes = ", ".join(f"{codec} {size / 1e6:,.0f} MB" for codec, size in codecs.items())
        yield f"caches by cache.codec: {sizes}; cache.filter = lz4 or zstd: at most that, how much less the data decide"
    if pixels := prices.get("pixels"):
        yield (
            f"image targets: cache.pixels=stored adds {pixels['stored_bytes'] / 1e6:,.0f} MB; "
            f"recut adds none and {1e3 * pixels['recut_seconds']:.2f} ms of a loader thread an image and step"
        )
