"""`permafrost report`: report.html, one file without any outside reference, made of nothing but the run's files. Every
number that comes straight from a file says from which (`data-from`), so that it can be compared with it."""

from __future__ import annotations

import base64
import datetime
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from cache.manifest import atomic_write
from pipeline import __version__
from pipeline.claims import FEWEST_SEEDS, contrasts, headline, mean_seconds
from pipeline.comparable import (
    epochs_unlike,
    frozen_for_all,
    scored_unlike,
    scores_said,
    seconds_unlike,
    stopped_unfairly,
)
from pipeline.foretold import foretold_line
from pipeline.job import Job
from pipeline.layout import RunPaths
from pipeline.story import Story, read_story
from pipeline.tables import (
    arms_table,
    caches_table,
    curve_table,
    foretold_table,
    parts_table,
    probes_table,
    rates_table,
    seeds_table,
    settings_tables,
    tuned_table,
)

WAITING, LOADER = 0.02, 0.95
"""Share of training spent waiting, and cached step against features in memory, beyond which the report warns."""


def run_report(job: Job) -> None:
    """Write the report of a run as it is now, and say where."""
    print(f"written: {write_report(job.paths)}")


def write_report(paths: RunPaths) -> Path:
    """Write <run>/report.html and its figures. Raises ConfigError where there is no run."""
    atomic_write(paths.report, render(read_story(paths)).encode())
    return paths.report


def render(story: Story) -> str:
    """The page."""
    from pipeline.charts import drawings  # matplotlib takes its time to load

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["commands"] = with_commands
    return environment.get_template("report.html.j2").render(
        title=first_line(story),
        name=story.paths.root.name,
        version=__version__,
        until=last_time(story),
        control=control(story),
        warnings=list(warnings(story)),
        missing=list(missing(story)),
        arms=arms_table(story),
        rates=rates_table(story),
        seeds=seeds_table(story),
        foretold=foretold_table(story),
        foretold_line=foretold_line((story.speedup or {}).get("predicted", {})),
        figures=drawings(story),
        points=curve_table(story),
        parts=parts_table(story),
        caches=caches_table(story),
        pictures=list(pictures(story)),
        tuned=tuned_table(story),
        probes=probes_table(story),
        machine=story.machine,
        settings=settings_tables(story),
    )


def first_line(story: Story) -> str:
    """The headline; of a run whose arms are not all there, how far it is."""
    if story.speedup:
        return headline(story.speedup, story.runs)
    if story.outdated:
        return "Not compared: speedup.json is of earlier stages or arms than those that lie here"
    done = [name for name, record in story.records.items() if record["status"] == "done"]
    return f"Not compared yet: {', '.join(done) or 'nothing'} done"


def control(story: Story) -> list[str]:
    """The sceptic's control in words, with the errors."""
    if not story.speedup:
        return []
    runs = story.runs or [story.speedup]
    stopped, whole = contrasts(story.speedup, runs), contrasts(story.speedup, runs, "e2e")
    if not whole:
        return []
    seconds, epoch = (statistics.fmean(one["early_stop"][key] for one in runs) for key in ("seconds", "epoch"))
    cached, freeze, e2e = (mean_seconds(runs, arm) for arm in ("cached", "freeze", "e2e"))
    images = story.speedup["arms"]["cached"]["curve"][-1]["probe_images"]
    why = stopped_unfairly(runs) if not any(one.unfair in str(one) for one in stopped if one.unfair) else ""
    errors = (
        "Seconds and scores are means over seeds; intervals are 95 %, by Student's t, of differences paired by seed. A "
        "difference within its interval is none."
        if len(story.seeds) >= FEWEST_SEEDS
        else f"A score on {images} images has the standard error given; what another seed would change comes on top."
    )
    early = (
        f"End to end stopped after {seconds:.1f} s (epoch {epoch:.1f}) against cached training at its end, "
        f"{cached:.1f} s: {'; '.join(map(str, stopped))}{f' ({why})' if why else ''}."
    )
    return [
        *([early] if stopped else []),
        f"End to end at its own end, {e2e:.1f} s, against the same: {'; '.join(map(str, whole))}.",
        errors,
        f"Freezing alone, without a cache, took {freeze:.1f} s in all, {freeze / cached:.2f}× the time of cached "
        "training.",
    ]


# --- what to know ---------------------------------------------------------------------------------------------------


def warnings(story: Story) -> Iterator[str]:
    """What a reader must know before believing a number, most serious first."""
    if story.summaries and (unlike := scored_unlike([{"arms": story.summaries}], story.summaries)):
        yield f"{unlike[0].upper()}{unlike[1:]}."
    stale = [verdict for verdict in story.verdicts if verdict.state == "stale"]
    for verdict in stale:
        yield f"{verdict.what} is stale: {verdict.reason}."
    if asked := scores_said((verdict.what, verdict.scored) for verdict in story.verdicts):
        yield f"{asked[0].upper()}{asked[1:]}."
    if story.outdated:
        yield "speedup.json is of earlier stages or arms, so it is left out here."
    if story.probe_unlike:
        yield (
            f"The scores of {', '.join(story.probe_unlike)} in probe.json are of other weights or images than the "
            "run's, so they are left out; `make probe` on the images that the run was scored on scores what is here."
        )
    if story.settings.get("mask", {}).get("groups") == 1 and len(story.settings["schedule"]["cuts"]) > 1:
        yield (
            "Full mode (mask.groups = 1) leaks: visible features have attended to the tokens that are hidden "
            "afterwards. The task is easier than it looks; judge by the probes, not by the loss."
        )
    if live := [str(stage["cut"]) for stage in story.stages if stage["cut"] and not stage["cache"]]:
        yield (
            f"At cut {', '.join(live)} the frozen blocks ran forward on every step: the cache did not fit "
            "cache.budget_gb."
        )
    if story.speedup and story.speedup["loader_bound"] < LOADER:
        yield (
            f"Reading features costs: a cached step runs at {story.speedup['loader_bound']:.2f} of its speed on "
            "features in memory."
        )
    if story.stages and (shared := frozen_for_all(story.stages[0])):
        yield f"{shared[0].upper()}{shared[1:]}."
    if story.speedup and (unlike := epochs_unlike(story.summaries)):
        yield f"{unlike[0].upper()}{unlike[1:]}."
    if why := seconds_unlike(story.summaries):
        yield f"{why[0].upper()}{why[1:]}."
    for name, record in story.records.items():
        waited = record.get("loader_wait_seconds") or 0.0
        if record["status"] == "done" and waited > WAITING * record["train_seconds"] > 0:
            yield f"{name} spent {100 * waited / record['train_seconds']:.0f} % of its training waiting for data."
        if record["status"] == "failed":
            yield f"{name} failed; events.jsonl holds its last losses."
    for where, events in story.steps.items():
        if told := [event for event in events if event.get("warning")]:
            yield f"{where.replace('-', ' ')}, step {told[-1]['step']}: {told[-1]['warning']}."
    if story.speedup and len(story.seeds) < FEWEST_SEEDS:
        yield (
            f"One seed is no proof. With {FEWEST_SEEDS} or more (runs in the same folder, alike but for the seed) "
            "differences have intervals over them; `make study NAME=seeds` makes such runs."
        )


def with_commands(line: str) -> Markup:
    """A line whose commands stand between backticks, as HTML."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(line))))


def missing(story: Story) -> Iterator[tuple[str, str]]:
    """What the report would show if it were there, and the command that makes it."""
    call = f"CONFIG={story.paths.config} RUN={story.paths.root}"
    if story.unknown:
        yield f"how the parts stand: {story.unknown}", f"make explain {call}"
    for verdict in story.verdicts:
        kind, _, which = verdict.what.partition(" ")
        if verdict.current or kind == "cache":
            continue
        target = {"stage": f"stage-{which}", "arm": which, "finetune": "finetune"}[kind]
        yield f"{verdict.what} ({verdict.state})", f"make {target} {call}"
    if not story.speedup and len(story.settings["schedule"]["cuts"]) > 1:
        yield "the comparison of the arms", f"make all {call}"
    if not list(pictures(story)) and story.stages:
        yield "reconstructions: drawn at the end of a stage whose decoder predicts pixels", f"make all {call}"
    if not story.finetune:
        yield "fine-tuned accuracy", f"make finetune {call}"


def last_time(story: Story) -> str:
    """When the last step was told, UTC; empty where none was."""
    times = [events[-1]["time"] for events in story.steps.values()]
    if not times:
        return ""
    return datetime.datetime.fromtimestamp(max(times), datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def pictures(story: Story) -> Iterator[tuple[str, str]]:
    """(whose, data URI) of the reconstructions that lie beside the run."""
    names = [name for name in story.records if name != "finetune"]
    for name in names:
        file = story.paths.figures / f"reconstructions-{name.removeprefix('arm ').replace(' ', '-')}.png"
        if file.exists():
            yield name, "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
