"""The tables of the report: what its story says, as text in cells, each with the file and field that it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.claims import PROBES, contrasts, interval, percent, points, standard_error
from pipeline.figures import STYLE
from pipeline.foretold import rows_of
from pipeline.speedup import cache_cost
from pipeline.story import Record, Story


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and the file and field that the number comes from, if it is one of a file's."""

    text: str
    source: str = ""
    error: str = ""
    """What the number may be off by."""


@dataclass(frozen=True)
class Table:
    """A table whose rows have names; `heads` are of the columns after that."""

    caption: str
    heads: list[str]
    rows: list[tuple[str, list[Cell]]]


def arms_table(story: Story) -> Table | None:
    """The arms side by side; without a comparison, as far as their records go."""
    found = story.summaries
    if not found:
        return None

    def row(name: str, key: str, form: str) -> tuple[str, list[Cell]]:
        return name, [Cell(said(arm[key], form), of_arm(story, arm_name, key)) for arm_name, arm in found.items()]

    def scores(name: str, key: str) -> tuple[str, list[Cell]]:
        cells = []
        for arm_name, arm in found.items():
            score, images = arm[key], arm["curve"][-1]["probe_images"] if arm["curve"] else 0
            cells.append(Cell(percent(score), of_arm(story, arm_name, key), error_of(score, images)))
        return name, cells

    rows = [
        row("training, s", "train_seconds", ".1f"),
        row("building caches, s", "cache_seconds", ".1f"),
        row("total, s", "total_seconds", ".1f"),
    ]
    if story.speedup:
        e2e = found["e2e"]["total_seconds"]
        rows.append(("speed-up in total", [Cell(f"{e2e / arm['total_seconds']:.2f}×") for arm in found.values()]))
    rows += [row("epochs", "epochs", "g"), row("images", "images", ",d")]
    rows += [scores(f"{name} top-1", key) for key, name in PROBES.items()]
    rows += [
        row("waiting for data within training, s", "loader_wait_seconds", ".2f"),
        row("evaluation, counted for no arm, s", "evaluate_seconds", ".1f"),
    ]
    if any(arm.get("crowded_seconds") is not None for arm in found.values()):
        rows.insert(-1, row("of the total lost to other work on the machine, s", "crowded_seconds", ".1f"))
    if any(arm["cache_seconds_elsewhere"] for arm in found.values()):
        rows.insert(2, row("of that elsewhere, s", "cache_seconds_elsewhere", ".1f"))
    partial = "" if story.speedup else ", as far as they are done"
    return Table(f"The arms{partial}; ± one standard error", list(found), rows)


def of_arm(story: Story, arm: str, key: str) -> str:
    return f"speedup.json#arms.{arm}.{key}" if story.speedup else ""


def rates_table(story: Story) -> Table | None:
    """Images per second of the arms by stage, from rounds in which their steps run in turn."""
    if not story.speedup or not story.speedup["speedup_by_stage"]:
        return None
    stages = story.speedup["speedup_by_stage"]

    def row(name: str, key: str, form: str) -> tuple[str, list[Cell]]:
        return name, [
            Cell(said(stage[key], form), f"speedup.json#speedup_by_stage.{number}.{key}")
            for number, stage in enumerate(stages)
        ]

    rows = [row(f"{arm}, images/s", f"{arm}_images_per_second", ".0f") for arm in ("e2e", "freeze", "cached")]
    rows += [row("cached over end to end", "ratio", ".2f"), row("bound by FLOPs", "flop_bound", ".2f")]
    heads = [f"cut {stage['cut']}{', live' if stage.get('live') else ''}" for stage in stages]
    return Table("Speed of a step by stage, medians", heads, rows)


def foretold_table(story: Story) -> Table | None:
    """What the plan foretold before the run, beside what was measured."""
    found = rows_of((story.speedup or {}).get("predicted", {}))
    rows = []
    for row in found:
        form = ".2f" if row.path == "speedup_total" else ".1f"
        where = f"speedup.json#predicted.{row.path}."
        cells = [Cell(said(row.pair[key], form), where + key) for key in ("predicted", "measured")]
        off = row.pair["difference"]
        cells.append(Cell("–" if off is None else f"{100 * off:+.1f} %"))
        rows.append((row.name, cells))
    heads = ["predicted", "measured", "off by"]
    return Table("Foretold by the plan, beside what was measured", heads, rows) if rows else None


def seeds_table(story: Story) -> Table | None:
    """What the runs that differ in their seed only say together: mean and 95 % interval by Student's t."""
    if len(story.seeds) < 2:
        return None
    rows = []
    for name, read in {
        "speed-up in total": lambda one: one["speedup_total"],
        **{f"{name} top-1, {arm}": score_of(arm, key) for key, name in PROBES.items() for arm in STYLE},
    }.items():
        values = [read(one) for one in story.runs]
        if None in values:
            continue
        mean, half = interval(values)
        score = name != "speed-up in total"
        text = percent(mean) if score else f"{mean:.2f}×"
        rows.append((name, [Cell(text), Cell(points(half) if score else f"±{half:.2f}")]))
    whole = contrasts(story.runs[0], story.runs, "e2e")
    for name, found in (("less e2e stopped early", contrasts(story.runs[0], story.runs)), ("less e2e", whole)):
        for one in found:
            assert one.paired.half is not None, "there are two seeds at least"
            claimed, _ = one.paired.claimed(one.unfair)
            within = Cell(points(one.paired.half), error="claimed" if claimed else "not claimed")
            rows.append((f"{one.name}, cached {name}", [Cell(f"{100 * one.difference:+.1f} points"), within]))
    return Table(f"Over {len(story.seeds)} seeds", ["mean", "95 % interval"], rows)


def score_of(arm: str, key: str) -> Any:
    return lambda one: one["arms"][arm][key]


def curve_table(story: Story) -> Table | None:
    """The points of the accuracy figures."""
    rows = []
    for name, arm in story.summaries.items():
        for number, point in enumerate(arm["curve"]):
            where = f"speedup.json#arms.{name}.curve.{number}." if story.speedup else ""
            cells = [Cell(said(point[key], form), where and where + key) for key, form in CURVE]
            cells[2:2] = [Cell(percent(point[key]), where and where + key) for key in PROBES]
            rows.append((name, cells))
    heads = ["seconds", "epoch", *PROBES.values(), "effective rank"]
    return Table("Points of the curves", heads, rows) if rows else None


CURVE = (("seconds", ".1f"), ("epoch", "g"), ("effective_rank", ".2f"))
PART_ROWS = (
    ("status", "status", ""),
    ("blocks frozen", "cut", "d"),
    ("epochs", "epochs", "g"),
    ("steps", "steps", ",d"),
    ("training, s", "train_seconds", ".1f"),
    ("of that waiting, s", "loader_wait_seconds", ".2f"),
    ("evaluation, s", "evaluate_seconds", ".1f"),
    ("images/s", "images_per_second", ".0f"),
    ("loss of the last epoch", "final_loss", ".4f"),
)
RING_ROW = ("of building caches waited for at turns of the ring, s", "refresh_wait_seconds", ".2f")


def parts_table(story: Story) -> Table:
    """Every part of the run, whatever its status."""
    names = list(story.records)
    turns = any("refresh_wait_seconds" in record for record in story.records.values())
    rows = [
        (
            label,
            [
                Cell(said(record.get(key), form), f"{file_of(name)}#{key}" if key in record else "")
                for name, record in story.records.items()
            ],
        )
        for label, key, form in (*PART_ROWS, *([RING_ROW] if turns else []))
    ]
    known = [cache_cost(record) if "cache_seconds" in record else None for record in story.records.values()]
    costs = [Cell(said(seconds, ".1f")) for seconds in known]
    rows.insert(6, ("building caches, s", costs))
    if any("blind_losses" in record for record in story.records.values()):
        for label, kind in (("loss without context", "place"), ("loss of the mean", "mean")):
            cells = [
                Cell(said(blind.get(kind), ".4f"), f"{file_of(name)}#blind_losses.{kind}" if blind else "")
                for name, record in story.records.items()
                for blind in [record.get("blind_losses", {})]
            ]
            rows.append((label, cells))
    reasons = [(record.get("ended") or {}).get("why", "") for record in story.records.values()]
    if any(reasons):
        rows.append(("ended early", [Cell(why or "–") for why in reasons]))
    return Table("The parts of the run", names, rows)


def file_of(name: str) -> str:
    """The record's file of a part, from the run's folder on."""
    kind, _, which = name.partition(" ")
    return {"stage": f"stage-{which}", "arm": f"arms/{which}"}.get(kind, kind) + "/stage.json"


def caches_table(story: Story) -> Table | None:
    """What the caches hold, take and lose."""
    if not story.caches:
        return None

    def row(name: str, key: str, read: Any) -> tuple[str, list[Cell]]:
        cells = []
        for cache in story.caches:
            source = f"{cache.folder.name}/manifest.json#{key}" if key else ""
            cells.append(Cell(read(cache), source))
        return name, cells

    rows = [
        row("size", "", lambda one: size(one.bytes)),
        row("codec", "", lambda one: one.codec),
        row("relative RMSE, worst view", "", lambda one: f"{max(e.relative_rmse for e in one.manifest.errors):.2e}"),
        row("against the images", "accumulated_error", lambda one: f"{one.manifest.accumulated_error:.2e}"),
        row("which is", "", lambda one: one.manifest.error_basis),
        row("largest error of a value", "", lambda one: f"{max(e.max_abs for e in one.manifest.errors):.2e}"),
        row("images", "num_samples", lambda one: f"{one.manifest.num_samples:,d}"),
        row("views", "views", lambda one: str(one.manifest.views)),
        row("token groups", "spec.groups", lambda one: str(one.manifest.spec.groups)),
        row("tokens × width", "", lambda one: f"{one.manifest.num_tokens} × {one.manifest.width}"),
        row("backend", "backend", lambda one: one.manifest.backend),
        row("built from", "", lambda one: f"cache {one.manifest.parent[:8]}" if one.manifest.parent else "images"),
    ]
    total = sum(cache.bytes for cache in story.caches)
    heads = [f"cut {cache.manifest.spec.cut} ({cache.manifest.fingerprint[:8]})" for cache in story.caches]
    return Table(f"Caches on disk, {size(total)} in all", heads, rows)


def tuned_table(story: Story) -> Table | None:
    """Accuracy after fine-tuning, head by head."""
    if not story.finetune:
        return None
    tuned, images = story.finetune, story.finetune["evaluated"]
    rows = []
    for number, head in enumerate(tuned["heads"]):
        source = f"finetune/stage.json#heads.{number}."
        cells = [
            Cell(percent(head[key]), source + key, error_of(head[key], images)) for key in ("top1", "top5")
        ]
        rows.append((f"after block {head['after']}", cells))
    return Table(f"Fine-tuned from {tuned['from']}; {images} images, ± one standard error", ["top-1", "top-5"], rows)


def probes_table(story: Story) -> Table | None:
    """What `probe` found last."""
    if not story.probe:
        return None
    names = list(dict.fromkeys(probe for one in story.probe.values() for probe in one["probes"]))
    rows = []
    for encoder, one in story.probe.items():
        found = one["probes"]
        cells = [
            Cell(
                percent(found[name]["top1"]) if name in found else "–",
                f"probe.json#{encoder}.probes.{name}.top1" if name in found else "",
                error_of(found[name]["top1"], one["images"]) if name in found else "",
            )
            for name in names
        ]
        rows.append((encoder, cells))
    return Table("Probes, top-1; ± one standard error", names, rows)


def settings_tables(story: Story) -> list[Table]:
    """config.toml, a table a section."""
    sections: dict[str, Record] = {"": {k: v for k, v in story.settings.items() if not isinstance(v, dict)}}
    sections |= {name: values for name, values in story.settings.items() if isinstance(values, dict)}
    return [
        Table(
            name or "run",
            ["value"],
            [(key, [Cell(setting(value), f"config.toml#{name and name + '.'}{key}")]) for key, value in values.items()],
        )
        for name, values in sections.items()
    ]


def error_of(score: float | None, images: int) -> str:
    """One standard error of a score, as text; none where there is no score."""
    return "" if score is None else points(standard_error(score, images))


def said(value: Any, form: str) -> str:
    """A value as a table shows it; a dash where there is none."""
    return "–" if value is None else format(value, form)


def setting(value: Any) -> str:
    """A setting as config.toml writes it."""
    return str(value).lower() if isinstance(value, bool) else f'"{value}"' if value == "" else str(value)


def size(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
