"""Runs what is missing or stale, in order, and says why. It decides with `decide`, as `explain` does, and leaves the
work itself to `work`, which is imported only when there is some, since torch takes its time to load."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.budget import budget_lines
from pipeline.config import ConfigError
from pipeline.decide import ARMS, Wanted, judge_all, judge_arm, judge_cache, judge_finetune, judge_stage
from pipeline.desk import Desk, at_work
from pipeline.disk import refuse_what_does_not_fit, release
from pipeline.foretold import read_plan, why_not
from pipeline.job import Job
from pipeline.kept import keep_last, kept_epochs
from pipeline.layout import StagePaths
from pipeline.memory import refuse_too_little_memory
from pipeline.needs import Need
from pipeline.ranks import rank_here
from pipeline.remaining import first_to_run
from pipeline.sharing import claim
from pipeline.speedup import current_comparison, keep_speed, kept_speed
from pipeline.tuned import Tuning
from stages.segment import Segment


def run_all(job: Job) -> None:
    """All stages, both baseline arms, the comparison, and the report."""
    with at_work(job) as desk:
        _run_all(desk)
        desk.note_settings()  # all is as they ask for, also where nothing had to run
        from pipeline.report import write_report

        desk.log.message(f"written: {write_report(job.paths)}")


def _run_all(desk: Desk) -> None:
    wanted = desk.wanted
    look_before(desk, wanted.candidates - 1)
    plan_first(desk)
    ensure_stages(desk)
    if len(wanted.segments) == 1:
        desk.log.message(f"{wanted.why_nothing_freezes}: there are no arms to compare")
        return
    ensure_caches_to_time(desk)
    for arm in ARMS:
        ensure_arm(desk, arm)
    ensure_compared(desk)


def ensure_caches_to_time(desk: Desk) -> None:
    """The comparison times steps on the caches of stages, which may be gone though these are current: they are built
    before anything else takes hours."""
    wanted = desk.wanted
    for stage in range(1, len(wanted.segments)) if not current_comparison(wanted) else ():
        for need in wanted.needs(stage) if not kept_speed(wanted, stage) else ():
            if not judge_cache(wanted, need).current:
                ensure_built(desk, need, wanted.needs(stage))
        # Where caches go once nothing needs them, steps are timed now, and the next stage's are often made of these.
        leave(desk, wanted.needs(stage + 1) if stage + 1 < len(wanted.segments) else ())


def ensure_stages(desk: Desk) -> None:
    """All stages, as many as there are."""
    wanted = desk.wanted
    for stage in range(wanted.candidates):
        if wanted.used_up(stage):
            desk.log.message(f"stage {stage}: does not exist, {wanted.why_no_stage(stage)}")
            break
        ensure_this_stage(desk, stage)


def ensure_compared(desk: Desk) -> None:
    """The comparison of the arms, all of which are current."""
    from pipeline.speedup import compare, show, tell_scores

    if current_comparison(desk.wanted):
        from pipeline.sceptic import refresh

        show(refresh(desk.wanted.paths))
        tell_scores(desk)
    else:
        compare(desk)


def plan_first(desk: Desk) -> None:
    """Where something is still to be trained and plan.json is not of this run on this machine, measure and make it, so
    that `speedup` can set what was foretold beside what came of it."""
    if rank_here().ranks > 1:
        return  # a plan is of one process, and each rank would measure
    wanted = desk.wanted
    parts = [verdict for verdict in judge_all(wanted) if verdict.what.startswith(("stage", "arm"))]
    if all(verdict.current for verdict in parts) or not why_not(wanted, read_plan(wanted)):
        return
    from pipeline.costs import make_plan, plan_line

    desk.log.message("plan: measuring steps and caches for some seconds")
    desk.log.message(plan_line(make_plan(wanted)))


def run_stage(job: Job) -> None:
    """Stage N, and first whatever before it is missing or stale."""
    with at_work(job) as desk:
        stage = _stage(desk.wanted, job.target, first=0)
        look_before(desk, stage)
        ensure_stage(desk, stage)


def run_cache(job: Job) -> None:
    """The caches that stage N reads, and first whatever before it is missing or stale."""
    with at_work(job) as desk:
        stage = _stage(desk.wanted, job.target, first=1)
        look_before(desk, stage, () if desk.wanted.used_up(stage) else desk.wanted.needs(stage))
        ensure_cache(desk, stage)
        if stage not in desk.wanted.cached_stages:
            desk.log.message("\n".join(budget_lines(desk.wanted)))


def run_arm(job: Job) -> None:
    """A baseline arm, and first stage 0, which all arms share."""
    with at_work(job) as desk:
        refuse_what_is_not_labelled(desk.wanted)
        refuse_epochs_that_never_end(desk.wanted)
        ensure_arm(desk, str(job.target))


def run_finetune(job: Job) -> None:
    """Supervised fine-tuning of a stage's or an arm's encoder, the last stage's by default, and first what it needs."""
    with at_work(job) as desk:
        if job.target is None and not desk.wanted.decided:
            raise ConfigError(
                "schedule.kind=adaptive has not decided yet which stage is the last; run `make all` first, or name a "
                "stage that is done, for instance `permafrost finetune 0`"
            )
        last = len(desk.wanted.segments) - 1
        start = last if job.target is None else job.target
        tuning = Tuning(desk.wanted, start if isinstance(start, str) else _stage(desk.wanted, start, first=0))
        tuning.refuse_what_cannot_be()
        look_before(desk, start if isinstance(start, int) else 0, [tuning.need] if tuning.need else [])
        ensure_finetuned(desk, tuning)


def ensure_finetuned(desk: Desk, tuning: Tuning) -> None:
    """Fine-tune unless that is current; of what lies before it, run what it needs."""
    ensure_maker(desk, tuning.encoder)
    verdict = judge_finetune(tuning)
    desk.say(verdict)
    if not verdict.current:
        if tuning.need:
            ensure_built(desk, tuning.need)
        from pipeline.finetuning import finetune

        finetune(desk, tuning)
    from pipeline.tuned import show_finetuned

    show_finetuned(desk.wanted)


def ensure_maker(desk: Desk, encoder: str) -> None:
    """Train the stage or the arm that an encoder comes from, silent when there is nothing to do."""
    kind, _, which = encoder.partition(" ")
    if kind == "stage":
        ensure_trained(desk, int(which))
    elif not (judge_stage(desk.wanted, 0).current and judge_arm(desk.wanted, which).current):
        ensure_arm(desk, which)


def ensure_stage(desk: Desk, stage: int) -> None:
    """Train a stage unless it is current; of what lies before it, run what it needs."""
    for earlier in range(stage):
        if not desk.wanted.used_up(earlier):
            ensure_this_stage(desk, earlier)
    refuse_what_does_not_exist(desk.wanted, stage)
    ensure_this_stage(desk, stage)


def ensure_this_stage(desk: Desk, stage: int) -> None:
    """`ensure_stage` where the stages before it are current."""
    wanted = desk.wanted
    verdict = judge_stage(wanted, stage)
    desk.say(verdict)
    if verdict.current:
        complete(wanted, wanted.paths.stage(stage), wanted.asked(stage))
    else:
        if stage:
            ensure_cache(desk, stage)
        from pipeline.work import train_stage

        train_stage(desk, stage)
    leave(desk)


def leave(desk: Desk, working: Sequence[Need] = ()) -> None:
    """Where only caches that are needed stay: time the steps of finished stages for `speedup` while their caches are
    there, then let go of what no later stage needs, nor whoever is `working`."""
    wanted = desk.wanted
    if wanted.config.cache.keep == "all":
        return
    for stage in range(1, min(first_to_run(wanted), len(wanted.segments))):
        needs = wanted.needs(stage)
        if needs and not kept_speed(wanted, stage) and all(judge_cache(wanted, need).current for need in needs):
            keep_speed(wanted, stage)
    release(desk, working)


def ensure_cache(desk: Desk, stage: int) -> None:
    """Build the caches that a stage reads unless they are current."""
    ensure_trained(desk, stage - 1)
    refuse_what_does_not_exist(desk.wanted, stage)
    for need in desk.wanted.needs(stage):
        ensure_built(desk, need, desk.wanted.needs(stage))


def ensure_built(desk: Desk, need: Need, working: Sequence[Need] = ()) -> None:
    """Build a cache unless it is current. Its parent is needed only when it has to be built; `working` stay with it."""
    claim(desk, [need, *working])
    verdict = judge_cache(desk.wanted, need)
    desk.say(verdict)
    if verdict.current:
        return
    from pipeline.building import build_cache
    from pipeline.care import regain

    if verdict.state == "unfinished" and regain(desk, need):
        return
    if need.parent:
        ensure_built(desk, need.parent, (need, *working))
    paths = desk.wanted.paths
    build_cache(desk, need, paths.finetune if need.tunes else paths.stage(need.stage))
    release(desk, (need, *working))


def ensure_trained(desk: Desk, stage: int) -> None:
    """`ensure_stage`, silent when there is nothing to do."""
    if not all(judge_stage(desk.wanted, earlier).current for earlier in range(stage + 1)):
        ensure_stage(desk, stage)


def ensure_arm(desk: Desk, arm: str) -> None:
    """Train a baseline arm unless it is current. Raises ConfigError when nothing freezes, or nobody knows yet when."""
    wanted = desk.wanted
    if not wanted.decided:
        raise ConfigError(
            f"arm {arm} follows the plan, which schedule.kind=adaptive decides while the stages run, and stage "
            f"{len(wanted.taken)} is not done; run `make all`, or `make stage-N` up to the last, first"
        )
    if len(wanted.segments) == 1:
        raise ConfigError(f"{wanted.why_nothing_freezes}, so arm {arm} is stage 0; {a_later_cut(wanted)}")
    ensure_trained(desk, 0)
    verdict = judge_arm(wanted, arm)
    desk.say(verdict)
    if verdict.current:
        complete(wanted, wanted.paths.arm(arm), wanted.arm_segments(arm))
        return
    from pipeline.work import train_baseline

    train_baseline(desk, arm)


def complete(wanted: Wanted, paths: StagePaths, segments: tuple[Segment, ...]) -> None:
    """Give a finished part the copy of its last epoch that has been asked for since."""
    record = wanted.record(paths)
    assert record is not None, "a current part has a record"
    keep_last(wanted.config.train.save_epochs, segments, record, paths)


def a_later_cut(wanted: Wanted) -> str:
    return "raise schedule.epochs or schedule.settle_below" if wanted.adaptive else "give a later cut as well"


def refuse_what_does_not_exist(wanted: Wanted, stage: int) -> None:
    """Raise ConfigError where an adaptive run has come to its end before a stage could begin."""
    if wanted.used_up(stage):
        raise ConfigError(f"stage {stage} does not exist: {wanted.why_no_stage(stage)}")


def look_before(desk: Desk, last: int, more: Sequence[Need] = ()) -> None:
    """What is told and refused before anything runs: images left out, batches and caches that do not fit."""
    data = desk.wanted.data
    for name, images in (("training", data.train), ("evaluation", data.val)):
        if images.skipped:
            first = ": ".join(images.skipped[0])
            desk.log.message(
                f"{name}: {len(images.skipped)} files are no images and left out, first {first}; "
                f"{desk.wanted.paths.index} names all"
            )
    if data.twins:
        first = ", the same as ".join(data.twins[0])
        desk.log.message(f"evaluation: {len(data.twins)} left out, as training has the same image, first {first}")
    leave(desk, more)
    refuse_too_little_memory(desk.wanted, last, more)
    refuse_what_does_not_fit(desk.wanted, last, more)
    refuse_what_is_not_labelled(desk.wanted)
    refuse_epochs_that_never_end(desk.wanted)
    desk.wanted.refuse_targets_of_later_stages()


def refuse_what_is_not_labelled(wanted: Wanted) -> None:
    """Raise ConfigError when stages are to end by their kNN and there is none."""
    data, early = wanted.data, wanted.config.train.early_stop
    if early and not all(any(images.labels >= 0) for images in (data.train, data.val)):
        raise ConfigError(
            f"train.early_stop = {early} needs kNN, and the images have no labels; sort them into a folder a class, "
            "or use train.early_stop=0"
        )


def refuse_epochs_that_never_end(wanted: Wanted) -> None:
    """Raise ConfigError when `train.max_steps` ends the run before an epoch that is to be kept."""
    asked = wanted.config.train.save_epochs
    if not wanted.adaptive and (never := sorted(set(asked) - set(kept_epochs(asked, wanted.segments)))):
        raise ConfigError(
            f"train.save_epochs has {never[0]}, an epoch that train.max_steps = {wanted.config.train.max_steps} "
            "leaves unfinished; raise train.max_steps or drop the epoch"
        )


def _stage(wanted: Wanted, target: str | int | None, first: int) -> int:
    """The stage that the user named. Raises ConfigError when the plan has none of that number."""
    last = wanted.candidates - 1
    if not isinstance(target, int) or not first <= target <= last:
        cuts = [wanted.cut(stage) for stage in range(last + 1)]
        raise ConfigError(f"no stage {target} here; the plan has {first}-{last} (cuts {cuts})")
    return target


def run_probe(job: Job) -> None:
    """Score the encoder of a stage or an arm, or all that are trained, with the probes that `eval.probes` asks for."""
    from pipeline.probing import probe_again

    wanted = Wanted(job.config, job.paths)
    names = [f"stage {stage}" for stage in range(wanted.candidates)] + [f"arm {arm}" for arm in ARMS]
    if job.target is not None:
        names = [f"stage {job.target}" if isinstance(job.target, int) else f"arm {job.target}"]
    probe_again(wanted, names)
