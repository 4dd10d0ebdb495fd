"""What the runs of a study have left behind: which are done, their rows, the table and the figure that are written of
them, and what is shown on a terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache.manifest import atomic_write
from cache.size import cache_bytes as bytes_of
from pipeline.decide import ARMS, Wanted, judge_arm, judge_finetune, judge_stage
from pipeline.grid import Request, Run
from pipeline.outcome import Row, lines, measured, results_csv, table_csv, table_md, tuned, with_control
from pipeline.recipes import RECIPES
from pipeline.report import write_report
from pipeline.sceptic import refresh
from pipeline.show import console, table
from pipeline.speedup import current_comparison
from pipeline.studies import STUDIES, Measured, study
from pipeline.tuned import Tuning


def tuning_of(wanted: Wanted) -> Tuning:
    """Fine-tuning from the last stage."""
    return Tuning(wanted, len(wanted.segments) - 1)


def current(wanted: Wanted, arm: Measured) -> bool:
    """Whether what a variant measures is there, as its settings ask for it."""
    stages = [stage for stage in range(wanted.candidates) if not wanted.used_up(stage)]
    if not all(judge_stage(wanted, stage).current for stage in (stages if arm in ("cached", "finetune") else [0])):
        return False
    if arm == "finetune":
        return judge_finetune(tuning_of(wanted)).current
    return arm == "cached" or (wanted.decided and judge_arm(wanted, arm).current)


def finished(run: Run) -> bool:
    """Whether nothing of a run is left to do."""
    wanted, arms = Wanted(run.config, run.paths), set(run.measures.values())
    if not all(current(wanted, arm) for arm in arms):
        return False
    return not compares(arms) or current_comparison(wanted) is not None


def compares(arms: set[Measured]) -> bool:
    """Whether a run has all three arms, and with them a comparison and a report of its own."""
    return {"cached", *ARMS} <= arms


def rows_of(run: Run) -> Iterator[Row]:
    """A row for every variant that measures something of a run."""
    wanted, failure = Wanted(run.config, run.paths), run.paths.root / "failed.json"
    for variant, arm in run.measures.items():
        values: dict[str, Any] = {"run": str(run.paths.root)}
        if not current(wanted, arm):
            state = "failed" if failure.exists() else "unfinished" if run.paths.config.exists() else "missing"
            values |= json.loads(failure.read_text()) if state == "failed" else {}
            yield Row(variant, run.seed, state, values)
            continue
        if arm == "finetune":
            yield Row(variant, run.seed, "done", values | tuned(record(wanted, "finetune")))
            continue
        names = [f"stage {stage}" for stage in range(len(wanted.segments))]
        names = names if arm == "cached" else ["stage 0", f"arm {arm}"]
        found, curve = measured([record(wanted, name) for name in names])
        sizes = {"cache_bytes": cache_bytes(wanted) if arm == "cached" else 0}
        yield Row(variant, run.seed, "done", values | found | sizes, curve)


def record(wanted: Wanted, name: str) -> dict[str, Any]:
    paths = wanted.paths.finetune if name == "finetune" else wanted.paths.encoder(name)
    found = wanted.record(paths)
    assert found is not None, "it is current"
    return found


def cache_bytes(wanted: Wanted) -> int:
    """What the caches of all stages take on disk together, at most where they are compressed."""
    needs = {need for stage in range(1, len(wanted.segments)) for need in wanted.needs(stage)}
    return sum(bytes_of(wanted.layout(need)) for need in needs)


def all_rows(request: Request) -> list[Row]:
    """The rows of all runs, by variant in the study's order, then by seed."""
    assert request.study is not None
    order = list(request.study.variants)
    found = [left_out(row, request) for run in request.runs for row in rows_of(run)]
    return with_control(request.study, sorted(found, key=lambda row: (order.index(row.variant), row.seed)))


def left_out(row: Row, request: Request) -> Row:
    """A row that is not there since this call was not asked for it says so; any other as it is."""
    only = request.flags.only
    if not only or row.variant in only or row.state in ("done", "failed"):
        return row
    return replace(row, values=row.values | {"why": "left out by --only"})


def write_results(request: Request) -> list[Row]:
    """Write results.csv, table.csv, table.md and study.png; bring comparisons and reports of the runs up to date."""
    from pipeline.study_figure import draw_study

    assert request.study is not None
    for run in request.runs:
        if compares(set(run.measures.values())) and run.paths.speedup.exists():
            refresh(run.paths)
            write_report(run.paths)
    name, rows = request.flags.name, all_rows(request)
    found = lines(request.study, rows)
    files = {
        "results.csv": results_csv(rows),
        "table.csv": table_csv(found),
        "table.md": table_md(request.study, name, facts(request), found, rows),
    }
    for file, text in files.items():
        atomic_write(request.folder / file, text.encode())
    draw_study(f"{name}: {request.study.question}", found, rows, request.folder / "study.png")
    return rows


def facts(request: Request) -> list[str]:
    """How it was run, for the table: command, data, machine, hours."""
    assert request.study is not None
    config, flags = request.runs[0].config, request.flags
    held = f"evaluated on {Path(flags.data_val).name}" if flags.data_val else "evaluated on a tenth that is held back"
    if config.data.has_own_val and not flags.data_val:
        held = f"evaluated on the {config.data.source}'s own evaluation images"
    if config.data.val_source and not flags.data_val:
        held = f"evaluated on {config.data.val_source}"
    call = f"make study NAME={flags.name}"
    call += f" CONFIG={flags.config if flags.config in RECIPES else '...'}" if flags.config else ""
    call += (" DATA=..." if flags.data else "") + (" DATA_VAL=..." if flags.data_val else "")
    call += f' SET="{" ".join(word for words in flags.set for word in words)}"' if flags.set else ""
    machines = sorted({machine for run in request.runs for machine in machines_of(run)})
    spent = sum(seconds_of(request.runs))
    return [
        f"- command: `{call}`, seeds {', '.join(map(str, request.study.seeds))}",
        f"- data: {Path(config.data.source).name}, {held}",
        f"- machine: {'; '.join(machines) or 'nothing has run yet'}",
        f"- time: {spent / 3600:.2f} hours of training, caches and evaluation, shared parts counted once",
    ]


def parts_of(runs: Iterable[Run]) -> Iterator[dict[str, Any]]:
    """The records that lie in runs."""
    for run in runs:
        for file in (*run.paths.root.glob("stage-*/stage.json"), *run.paths.root.glob("arms/*/stage.json")):
            yield json.loads(file.read_text())
        if (tuning := run.paths.finetune.json).exists():
            yield json.loads(tuning.read_text())


def machines_of(run: Run) -> set[str]:
    """With what the parts of a run were made."""
    found = [part["machine"] for part in parts_of([run]) if "machine" in part]
    return {f"{one['device']}, {one['threads']} threads, {one['precision']}" for one in found}


def seconds_of(runs: Iterable[Run]) -> list[float]:
    """Seconds that each distinct finished part took, evaluation and the caches that it built itself included."""
    taken = {part["fingerprint"] + str(part.get("state")): part for part in parts_of(runs) if part["status"] == "done"}
    keys = ("train_seconds", "cache_seconds", "evaluate_seconds")
    return [sum(part.get(key) or 0.0 for key in keys) for part in taken.values()]


# --- shown -----------------------------------------------------------------------------------------------------------


def show_studies(root: Path) -> None:
    """Every study with its question, how many runs it takes, and how many of them have left their records."""
    out = table("study", "variants", "runs", "begun", "question")
    for name in STUDIES:
        asked = study(name)
        runs = len({(variant_key(v.settings)) for v in asked.variants.values()}) * len(asked.seeds)
        begun = len(list((root / name).glob("*-seed-*/config.toml")))
        out.add_row(name, str(len(asked.variants)), str(runs), str(begun), asked.question)
    console().print(out)
    console().print("`permafrost study NAME --list` tells the runs of one and how they stand; `--hours` bounds time.")


def variant_key(settings: Any) -> str:
    return json.dumps(dict(settings), sort_keys=True)


def show_runs(request: Request) -> None:
    """The runs of a study, in the order in which they would run, what they train, and how they stand."""
    assert request.study is not None
    out = table("run", "seed", "measured", "epochs", "state")
    left = 0
    for run in request.asked:
        states = {row.variant: row.state for row in rows_of(run)}
        left += any(state != "done" for state in states.values())
        told = ", ".join(dict.fromkeys(states.values()))
        epochs = "+".join(map(str, run.config.schedule.epochs))
        out.add_row(run.name, str(run.seed), ", ".join(dict.fromkeys(run.measures.values())), epochs, told)
    console().print(request.study.question, markup=False)
    console().print(" ".join((STUDIES[request.flags.name].__doc__ or "").split()), markup=False)
    console().print(out)
    console().print(f"{left} of {len(request.asked)} runs are still to do; equal stages are trained once.")


def show_results(request: Request, rows: Sequence[Row]) -> None:
    """The table on the terminal, and where the files are."""
    text = (request.folder / "table.md").read_text(encoding="utf-8")
    console().print(text, markup=False)
    console().print(f"written: {request.folder}/table.md, table.csv, results.csv, study.png", markup=False)
