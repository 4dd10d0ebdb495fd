"""What the runs of a study found: a row for each variant and seed, then over seeds means, intervals and differences
paired seed by seed, as CSV and Markdown. Pure functions of the runs' records. Free of torch."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.claims import FEWEST_SEEDS, Paired, interval, paired, points
from pipeline.comparable import crowded, trained_unlike, uncosted, unfinished, ways_unlike
from pipeline.speedup import arm_summary, cache_cost, crowded_seconds, stopped_at, watched_seconds
from pipeline.studies import Study

Record = dict[str, Any]
MEASURES = {"knn_top1": "kNN", "linear_top1": "linear probe", "top1": "fine-tuned"}
"""The scores of a row, shares from 0 to 1, and how tables call them."""
LOSSES = {"final_loss": "loss", "place_loss": "loss without context", "mean_loss": "loss of the mean"}
"""The loss of a row's last epoch, and those of predictors that see nothing of an image (`stages/blind.py`)."""
COLUMNS = (
    *("variant", "seed", "state", "knn_top1", "linear_top1", "top1", "total_seconds", "train_seconds", "cache_seconds"),
    *("evaluate_seconds", "crowded_seconds", "cache_bytes", "epochs", "images", *LOSSES, "knn_peak", "knn_peak_epoch"),
    *("knn_top1_e2e_stopped", "linear_top1_e2e_stopped", "probe_images", "run", "why"),
)
"""The columns of results.csv; the last says why a run failed."""

SUMMARISED = (*MEASURES, "total_seconds", "cache_bytes", "knn_peak_epoch", *LOSSES)
"""What the table gives means over seeds of."""


@dataclass(frozen=True)
class Row:
    """One variant with one seed."""

    variant: str
    seed: int
    state: str
    """done, or failed, unfinished, missing: then there are no values."""
    values: Record
    curve: tuple[Record, ...] = ()
    """(seconds, epoch, scores) along the way."""

    def score(self, key: str) -> float | None:
        """A number of a finished row; None where there is none."""
        found = self.values.get(key)
        return None if found is None else float(found)

    def unlike(self, other: Row) -> str:
        """How it was scored otherwise than another; empty where the two compare."""
        return ways_unlike(way for row in (self, other) for way in row.values.get("scored", [None]))

    def not_timed(self, other: Row) -> str:
        """Why its seconds and another's do not compare; empty where they do."""
        pair = {row.variant: row.values for row in (self, other)}
        busy = "other work had the cores for a part of one" if crowded(pair) else ""
        unknown = "what caches of one have cost is not known" if uncosted(pair) else ""
        return trained_unlike(pair.values()) or busy or unknown


def measured(parts: Sequence[Record]) -> tuple[Record, tuple[Record, ...]]:
    """(values, curve) of an arm from the records of its parts, in order."""
    arm = arm_summary(list(parts))
    curve = tuple(arm.pop("curve"))
    values = arm | {"final_loss": parts[-1]["final_loss"], "probe_images": curve[-1]["probe_images"] if curve else 0}
    values |= {f"{kind}_loss": parts[-1].get("blind_losses", {}).get(kind) for kind in ("place", "mean")}
    told = [point for point in curve if point["knn_top1"] is not None]
    if told:
        peak = max(told, key=lambda point: point["knn_top1"])
        values |= {"knn_peak": peak["knn_top1"], "knn_peak_epoch": peak["epoch"]}
    return values, curve


def tuned(record: Record) -> Record:
    """The values of a fine-tuning: its own seconds, not those of the encoder's pre-training."""
    cache = cache_cost(record)
    keys = ("top1", "train_seconds", "evaluate_seconds", "epochs", "images", "final_loss")
    values = {key: record[key] for key in keys}
    seconds: Record = {"cache_seconds": cache, "total_seconds": record["train_seconds"] + cache}
    seconds |= {"cache_cost_known": record.get("cache_seconds_elsewhere", 0.0) is not None}
    seconds |= {"crowded_seconds": crowded_seconds(record), "watched_seconds": watched_seconds(record)}
    return values | seconds | {"probe_images": record["evaluated"], "scored": [record.get("scored")]}


def with_control(study: Study, rows: Iterable[Row]) -> list[Row]:
    """The rows, each with what end to end of the same seed scores when it is stopped after as many seconds, and, under
    `had_ended`, whether it was done before; or, under `not_stopped`, why that is not known."""
    rows = list(rows)
    ends = {row.seed: row for row in rows if row.variant == study.end_to_end and row.curve}
    found = []
    for row in rows:
        end = ends.get(row.seed)
        if end and row.curve and row.variant != study.end_to_end and not row.unlike(end):
            total = row.values["total_seconds"]
            more: Record = {"not_stopped": row.not_timed(end) or unfinished(end.values, total)}
            if not more["not_stopped"]:
                stopped = stopped_at(list(end.curve), total)
                more = {f"{key}_e2e_stopped": stopped[key] for key in ("knn_top1", "linear_top1")}
                more |= {"had_ended": total > end.values["total_seconds"]}
            row = Row(row.variant, row.seed, row.state, row.values | more, row.curve)
        found.append(row)
    return found


@dataclass(frozen=True)
class Line:
    """A variant over its finished seeds."""

    variant: str
    against: str
    seeds: tuple[int, ...]
    means: Mapping[str, tuple[float, float | None]]
    """By what is summarised: the mean, and half of its 95 % interval; None with one seed."""
    control: Mapping[str, Paired]
    """By score: the variant less what it is compared with."""
    stopped: Mapping[str, Paired]
    """By score: the variant less end to end stopped after as many seconds."""
    unlike: tuple[int, ...] = ()
    """Seeds whose two rows were scored differently, so that they are not compared."""
    longer: tuple[int, ...] = ()
    """Seeds in which end to end had ended by the time that the variant took: its end is what is compared with."""


def lines(study: Study, rows: Sequence[Row]) -> list[Line]:
    """The variants in order. Differences are of the seeds that both have finished."""
    found = []
    for name, variant in study.variants.items():
        own = [row for row in rows if row.variant == name and row.state == "done"]
        against = variant.against or study.control
        other = [row for row in rows if row.variant == against and row.state == "done"]
        unlike = [row.seed for row in other for mine in own if mine.seed == row.seed and mine.unlike(row)]
        other = [row for row in other if row.seed not in unlike]
        images = max((int(row.values.get("probe_images") or 0) for row in own), default=0)
        means: dict[str, tuple[float, float | None]] = {}
        control: dict[str, Paired] = {}
        stopped: dict[str, Paired] = {}
        for key in SUMMARISED:
            if values := list(by_seed(own, key).values()):
                means[key] = interval(values) if len(values) > 1 else (values[0], None)
        for key in MEASURES:
            if name != against and (pair := paired(by_seed(own, key), by_seed(other, key), images)):
                control[key] = pair
            if pair := paired(by_seed(own, key), by_seed(own, f"{key}_e2e_stopped"), images):
                stopped[key] = pair
        seeds = tuple(sorted(row.seed for row in own))
        longer = tuple(sorted(row.seed for row in own if row.values.get("had_ended")))
        against = against if name != against else ""
        found.append(Line(name, against, seeds, means, control, stopped, tuple(unlike), longer))
    return found


def by_seed(rows: Iterable[Row], key: str) -> dict[int, float]:
    """A number of the rows that have it, by seed."""
    return {row.seed: score for row in rows if (score := row.score(key)) is not None}


# --- written --------------------------------------------------------------------------------------------------------


def results_csv(rows: Sequence[Row]) -> str:
    """A line for every variant and seed."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row.values | {"variant": row.variant, "seed": row.seed, "state": row.state})
    return out.getvalue()


def table_csv(found: Sequence[Line]) -> str:
    """A line for every variant: means and differences, each with half of its 95 % interval, empty with one seed."""
    out = io.StringIO()
    heads = ["variant", "against", "seeds"]
    for key in SUMMARISED:
        heads += [key, f"{key}_half"]
    for kind in ("control", "e2e_stopped"):
        for key in MEASURES:
            heads += [f"{key}_less_{kind}", f"{key}_less_{kind}_half"]
    writer = csv.DictWriter(out, heads, restval="", lineterminator="\n")
    writer.writeheader()
    for line in found:
        cells: Record = {"variant": line.variant, "against": line.against, "seeds": len(line.seeds)}
        for key, (mean, half) in line.means.items():
            cells |= {key: mean, f"{key}_half": half}
        for kind, pairs in (("control", line.control), ("e2e_stopped", line.stopped)):
            for key, pair in pairs.items():
                cells |= {f"{key}_less_{kind}": pair.mean, f"{key}_less_{kind}_half": pair.half}
        writer.writerow({key: "" if value is None else value for key, value in cells.items()})
    return out.getvalue()


def table_md(study: Study, name: str, facts: Sequence[str], found: Sequence[Line], rows: Sequence[Row]) -> str:
    """The study as Markdown: the question, how it was run, the table, what may be claimed, and what failed."""
    keys = [key for key in MEASURES if any(key in line.means for line in found)]
    stopped = any(line.stopped for line in found)
    heads = ["variant", "seeds", "seconds", *(MEASURES[key] for key in keys), "against"]
    heads += [f"{MEASURES[key]}, difference" for key in keys]
    heads += [f"{MEASURES[key]}, less e2e stopped" for key in keys if key != "top1"] if stopped else []
    losses = LOSSES if study.losses else {}
    heads += losses.values()
    out = [f"# {name}: {study.question}", "", *facts, "", md_row(heads), md_row(["---"] * len(heads))]
    for line in found:
        cells = [line.variant, str(len(line.seeds)), seconds(line)]
        cells += [said(line.means.get(key)) for key in keys]
        cells += [line.against or "–", *(difference(line.control.get(key)) for key in keys)]
        cells += [difference(line.stopped.get(key)) for key in keys if key != "top1"] if stopped else []
        cells += [number(line.means.get(key)) for key in losses]
        out.append(md_row(cells))
    out += [
        "",
        "Means over seeds; ± is half of a 95 % interval by Student's t, of differences paired seed by seed. Seconds "
        "are training and cache building. `e2e stopped` is end to end stopped after as many seconds, between two "
        f"points of its curve by linear interpolation. With fewer than {FEWEST_SEEDS} seeds one binomial standard "
        "error of a score on the evaluation images stands in brackets, and no difference is claimed.",
        "",
        "## What may be claimed",
        "",
        *(f"- {text}" for text in claims(found)),
    ]
    for line in found:
        if line.unlike:
            pair, which = f"{line.variant} and {line.against}", ", ".join(map(str, line.unlike))
            out += ["", f"{pair} were scored differently with seed {which}, and are not compared there."]
    if longer := [f"{line.variant}, seed {', '.join(map(str, line.longer))}" for line in found if line.longer]:
        what = "End to end had ended before these had, so that they are compared with its end, which took fewer seconds"
        out += ["", f"{what}: {'; '.join(longer)}."]
    if not_stopped := sorted({why for row in rows if (why := row.values.get("not_stopped"))}):
        out += ["", f"Rows are not compared with end to end stopped early where {'; '.join(not_stopped)}."]
    done = {f"{row.variant}, seed {row.seed}": row.values for row in rows if row.state == "done"}
    out += [line for told in (uncosted(done), crowded(done)) if told for line in ("", f"{told[0].upper()}{told[1:]}.")]
    if bad := [row for row in rows if row.state != "done"]:
        out += ["", "## Not there", ""]
        told = [f"{row.variant}, seed {row.seed}: {row.state}: {row.values.get('why', '')}" for row in bad]
        out += [f"- {text.rstrip(': ')}" for text in told]
    return "\n".join(out) + "\n"


def claims(found: Sequence[Line]) -> list[str]:
    """What the intervals carry, variant by variant, and no more."""
    told = []
    for line in found:
        early = "e2e stopped after as many seconds" + (", or at its end where that came first" if line.longer else "")
        for whom, pairs in ((line.against, line.control), (early, line.stopped)):
            told += [f"{line.variant} against {whom}: {MEASURES[key]} {pair.said}." for key, pair in pairs.items()]
    return told or ["nothing yet: no variant and what it is compared with have finished on the same seed."]


def seconds(line: Line) -> str:
    """`412 ± 8`."""
    mean, half = line.means.get("total_seconds", (None, None))
    return "–" if mean is None else f"{mean:.0f}" + (f" ± {half:.0f}" if half is not None else "")


def said(found: tuple[float, float | None] | None) -> str:
    """`41.2 ± 0.4`, per cent."""
    if found is None:
        return "–"
    mean, half = found
    return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if half is not None else "")


def number(found: tuple[float, float | None] | None) -> str:
    """`0.512 ± 0.004`, a loss."""
    if found is None:
        return "–"
    mean, half = found
    return f"{mean:.3f}" + (f" ± {half:.3f}" if half is not None else "")


def difference(pair: Paired | None) -> str:
    """`+1.2 ± 0.4`, points; bold where it is claimed."""
    if pair is None:
        return "–"
    text = f"{100 * pair.mean:+.1f}" + (f" ± {100 * pair.half:.1f}" if pair.half is not None else "")
    if pair.seeds < FEWEST_SEEDS:
        return f"{text} ({points(pair.error)})"
    return f"**{text}**" if pair.sure else text


def md_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
