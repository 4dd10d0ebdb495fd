"""Which settings of schedule, rates and early ends make no sense together. Part of the check of all settings, before
anything runs."""

from __future__ import annotations

from collections.abc import Iterator

from stages.config import EvalConfig, ScheduleConfig, TrainConfig


def timing_problems(schedule: ScheduleConfig, train: TrainConfig, evaluation: EvalConfig) -> Iterator[str]:
    """One line for each problem: value, bound and remedy."""
    yield from _length_problems(schedule)
    yield from _freezing_problems(schedule)
    yield from _rate_problems(schedule, train)
    yield from _ending_problems(schedule, train, evaluation)


def _length_problems(schedule: ScheduleConfig) -> Iterator[str]:
    cuts, epochs = list(schedule.cuts), list(schedule.epochs)
    if cuts[:1] != [0] or sorted(set(cuts)) != cuts:
        yield f"schedule.cuts = {cuts} does not start at 0 and rise; write for example schedule.cuts=[0,3,6,9]"
    if not epochs or min([epochs[0] + 1, *epochs[1:]]) < 1:
        yield f"schedule.epochs = {epochs} has a stage of less than 1 epoch; raise it or drop the stage"
    if schedule.kind == "explicit" and len(cuts) != len(epochs):
        yield f"schedule.cuts = {cuts} and schedule.epochs = {epochs} differ in length; give every cut its epochs"


def _freezing_problems(schedule: ScheduleConfig) -> Iterator[str]:
    if schedule.caches == "cost" and schedule.kind != "freezeout":
        yield (
            f"schedule.caches = cost chooses among freeze events, and schedule.kind = {schedule.kind} has none; "
            "use schedule.kind=freezeout or schedule.caches=given"
        )
    cached = "schedule.caches = cost asks for caches" if schedule.caches == "cost" else ""
    if list(schedule.cuts) != [0]:
        cached = cached or f"schedule.cuts = {list(schedule.cuts)} has a cut above 0"
    if not schedule.freeze_embed and cached:
        yield (
            "schedule.freeze_embed = False lets layer 0 learn, so backward has to cross every block and nothing can be "
            f"cached, but {cached}; use schedule.cuts=[0] with schedule.caches=given, or schedule.freeze_embed=True"
        )


def _rate_problems(schedule: ScheduleConfig, train: TrainConfig) -> Iterator[str]:
    by_layer = schedule.kind == "freezeout" and schedule.layer_rates == "cosine"
    if by_layer and train.lr_schedule == "schedule_free":
        yield (
            "train.lr_schedule = schedule_free has no schedule, but schedule.layer_rates = cosine gives layers one; "
            "use schedule.layer_rates=shared"
        )
    if by_layer and train.lr_restart:
        yield (
            "train.lr_restart = True begins the rate anew at every stage, but schedule.layer_rates = cosine runs over "
            "the whole run; use schedule.layer_rates=shared or train.lr_restart=False"
        )
    if schedule.kind == "adaptive" and train.lr_restart and train.lr_schedule in ("cosine", "wsd"):
        yield (
            f"train.lr_restart = True needs the stages' lengths for {train.lr_schedule}, which schedule.kind "
            "= adaptive decides only while it runs; use train.lr_schedule=constant or train.lr_restart=False"
        )


def _ending_problems(schedule: ScheduleConfig, train: TrainConfig, evaluation: EvalConfig) -> Iterator[str]:
    total = sum(schedule.epochs)
    if schedule.kind == "adaptive" and train.max_steps:
        yield (
            f"train.max_steps = {train.max_steps} ends a stage that schedule.kind = adaptive ends by itself; "
            "use train.max_steps=0"
        )
    if schedule.kind == "freezeout" and train.max_steps:
        yield (
            f"train.max_steps = {train.max_steps} ends stages before the {total} epochs over which schedule.kind = "
            "freezeout lays out rates and cuts; use train.max_steps=0 with fewer schedule.epochs"
        )
    if train.early_stop and not evaluation.every:
        yield (
            f"train.early_stop = {train.early_stop} counts evaluations, but eval.every = 0 makes none before a stage's "
            "end; use eval.every=1 or train.early_stop=0"
        )
    if outside := [epoch for epoch in train.save_epochs if not 1 <= epoch <= total]:
        yield f"train.save_epochs has {outside[0]}, which is outside 1..{total}, the epochs of the run; drop it"
