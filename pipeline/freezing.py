"""What people are told of when blocks freeze: FreezeOut's freeze events with their predicted cost, and what an adaptive
run has decided and leaves open. For `plan`, `explain` and `status`. Free of torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from pipeline.course import Course
from pipeline.show import console, table
from stages.flops import Event, run_flops
from stages.schedule import freeze_events


@dataclass(frozen=True)
class EventCost:
    """A freeze event, what was chosen for it, and what it costs in FLOPs by `stages.flops`."""

    epoch: int
    cut: int
    cached: bool
    cache_flops: int
    """Encoding of its cache, from the cache before it; what it would be where it gets none."""
    training_flops: int
    """Training from it to the next event."""
    otherwise: float
    """FLOPs of the whole run if this event alone were decided the other way, over those of the plan."""


def event_costs(course: Course) -> list[EventCost]:
    """Every freeze event of a FreezeOut run, in order; empty for other kinds."""
    schedule, train = course.config.schedule, course.config.train
    if schedule.kind != "freezeout":
        return []
    work = course.work
    inside = freeze_events(schedule, work.depth, course.steps_per_epoch, train.warmup_epochs)
    cached = {Event(stage.first_epoch, stage.cut) for stage in course.plan[1:]}
    marks = sorted({*inside, *cached}, key=lambda event: (event.epoch, event.cut))
    total, found, entry = sum(schedule.epochs), [], 0
    plan = run_flops(work, marks, _in_order(marks, cached), total)
    for mark, end in zip(marks, [*(mark.epoch for mark in marks[1:]), total], strict=True):
        cost, chosen = work.encode(entry, mark.cut), mark in cached
        entry = mark.cut if chosen else entry
        training = work.training(entry, [(end - mark.epoch, mark.cut)])
        other = run_flops(work, marks, _in_order(marks, cached ^ {mark}), total)
        found.append(EventCost(mark.epoch, mark.cut, chosen, cost, training, other / plan))
    return found


def _in_order(marks: list[Event], chosen: set[Event]) -> list[Event]:
    return [mark for mark in marks if mark in chosen]


def show_events(course: Course) -> list[dict[str, object]]:
    """Print the freeze events of a FreezeOut run; returns them for plan.json."""
    found = event_costs(course)
    if found:
        rows = table("freeze at epoch", "blocks before", "then", "cache TFLOPs", "training TFLOPs", "the other way")
        for event in found:
            rows.add_row(
                *(str(event.epoch), str(event.cut), "cached" if event.cached else "in place"),
                *(f"{flops / 1e12:,.4g}" for flops in (event.cache_flops, event.training_flops)),
                f"{100 * (event.otherwise - 1):+.1f} %",
            )
        console().print(rows)
    return [asdict(event) for event in found]


def adaptive_notes(course: Course) -> list[str]:
    """A line for every stage that an adaptive run has decided, is at, or may still come to; empty for other kinds."""
    schedule = course.config.schedule
    if not course.adaptive:
        return []
    found, left, taken = [], sum(schedule.epochs), course.taken
    for stage, cut in enumerate(schedule.cuts):
        name = f"stage {stage} (cut {cut}):"
        if not left:
            found.append(f"{name} does not exist, the stages before it took all {sum(schedule.epochs)} epochs")
        elif stage < len(taken):
            left -= min(left, taken[stage])
            ended = (course.record(course.paths.stage(stage)) or {}).get("ended")
            found.append(f"{name} decided, {taken[stage]} epochs; {ended['why'] if ended else 'all that was left'}")
        elif stage > len(taken):
            found.append(f"{name} open")
        elif stage + 1 < len(schedule.cuts):
            next_cut = schedule.cuts[stage + 1]
            found.append(f"{name} open, up to {left} epochs, until the blocks before {next_cut} have settled")
        else:
            found.append(f"{name} open, the {left} epochs that are left")
    return found


def show_adaptive(course: Course) -> None:
    """Print the notes, if any."""
    for note in adaptive_notes(course):
        console().print(note, markup=False)
