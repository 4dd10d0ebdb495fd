"""The budget of the disk: which stages get caches, what is refused, what runs live, and what is let go of when."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from cache.manifest import read_manifest
from cache.size import cache_bytes
from models.spec import FeatureSpec
from pipeline import care, costs, disk, equivalence, explain, runner, speedup
from pipeline.budget import Candidate, Sizes, choose, course_of_disk
from pipeline.checks import check
from pipeline.config import ConfigError, PipelineConfig
from pipeline.decide import Wanted, judge_all
from pipeline.events import EventLog
from pipeline.inputs import inputs_digest
from pipeline.job import Interrupted
from pipeline.layout import RunPaths
from pipeline.needs import Need
from tests.pipeline.toy import StopAfter, job, record, same, toy, weights

FOUR = {
    **{"data.limit": 48, "schedule.cuts": [0, 1, 2, 3], "schedule.epochs": [1, 3, 1, 2]},
    **{"cache.shard_rows": 24, "eval.train_limit": 24, "eval.val_limit": 24},
}
"""Stage 2 would save least by a cache: two blocks for one epoch, beside one block for three and three for two."""


def four(caches: float = 0.0, **changes: object) -> PipelineConfig:
    """caches: how many of the three there is room for, the rest runs live; 0 for no bound."""
    if caches:
        bound = caches * one_cache() / 1e9
        changes |= {"cache.budget_gb": bound, "cache.over_budget": "live"}
    return toy(**FOUR | changes)


@cache
def one_cache(views: int = 2) -> int:
    """Bytes of a cache; all cuts of the toy have the same."""
    with TemporaryDirectory() as place:
        wanted = Wanted(toy(**FOUR | {"cache.views": views}), RunPaths(Path(place)))
        return cache_bytes(wanted.layout(wanted.features(1)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain") / "toy"
    runner.run_stage(job(root, four(), target=3))
    return root


@contextmanager
def told() -> Iterator[list[str]]:
    """What runs tell meanwhile."""
    lines: list[str] = []
    plain = EventLog.message
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EventLog, "message", lambda self, text: lines.append(text) or plain(self, text))
        yield lines


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stage 2 has no cache."""
    root = tmp_path_factory.mktemp("live") / "toy"
    with told() as lines:
        runner.run_all(job(root, four(2.5)))
    assert "stage 2: its frozen blocks run live, for want of cache.budget_gb; see `make explain`" in lines
    return root


@pytest.fixture(scope="module")
def needed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run that keeps only what it needs, and what it told."""
    root = tmp_path_factory.mktemp("needed") / "toy"
    with told() as lines:
        runner.run_all(job(root, toy(**{"cache.keep": "needed"})))
    return root, lines


# --- the choice and the course of the disk ----------------------------------------------------------------------------


@cache
def draft() -> FeatureSpec:
    with TemporaryDirectory() as place:
        return Wanted(toy(), RunPaths(Path(place))).draft_spec(0)


def chain(cuts: Sequence[int], taught: Sequence[Sequence[int]]) -> list[tuple[Need, ...]]:
    """What stages with these cuts read: features that continue the stage before, and their teacher's blocks."""
    stages: list[tuple[Need, ...]] = []
    teachers: dict[int, Need] = {}
    for cut, blocks in zip(cuts, taught, strict=True):
        for block in blocks if not stages else ():
            before = teachers[max(teachers)] if teachers else None
            teachers[block] = Need(f"teacher-{block}", 0, replace(draft(), cut=block, groups=1), before)
        parent = stages[-1][0] if stages else None
        own = Need(f"cut-{cut}", cut - 1, replace(draft(), cut=cut), parent)
        stages.append((own, *(teachers[block] for block in blocks)))
    return stages


@pytest.mark.parametrize("keep_all", [True, False])
def test_the_choice_is_the_best_of_all_subsets(keep_all: bool) -> None:
    """Against every subset, whose caches are laid on the disk one after the other."""
    draw, tight = random.Random(7), 0
    for _ in range(60):
        count = draw.randint(1, 5)
        blocks = [sorted(draw.sample(range(1, 9), draw.randint(0, 3)))]
        for _ in range(count - 1):
            blocks.append(blocks[-1][draw.randint(0, 1) :])
        size = {f"cut-{k + 1}": draw.randint(1, 20) for k in range(count)}
        size |= {f"teacher-{block}": draw.randint(1, 10) for block in range(1, 9)}
        candidates = [
            Candidate(k, size[f"cut-{k}"], sum(size[f"teacher-{b}"] for b in blocks[k - 1]), draw.randint(1, 30))
            for k in range(1, count + 1)
        ]
        budget = draw.randint(0, 70)

        def most(subset: Sequence[Candidate], blocks=blocks, size=size) -> int:
            stages = chain([one.stage for one in subset], [blocks[one.stage - 1] for one in subset])
            return course_of_disk(stages, (), Sizes(lambda need: size[need.name]), keep_all)[0]

        subsets = [s for length in range(count + 1) for s in combinations(candidates, length)]
        best = max(sum(one.saving for one in subset) for subset in subsets if most(subset) <= budget)
        chosen = choose(candidates, budget, keep_all)
        mine = [one for one in candidates if one.stage in chosen]
        assert sum(one.saving for one in mine) == best and most(mine) <= budget
        tight += 0 < len(mine) < count
    assert tight > 10


def test_most_bytes_at_once_by_hand() -> None:
    """Caches of 10, 20 and 30 bytes, each made from the one before, and a teacher's of 1 and 2 beside the first two."""
    stages = chain([1, 2, 3], [[5, 6], [6], []])
    size = {"cut-1": 10, "cut-2": 20, "cut-3": 30, "teacher-5": 1, "teacher-6": 2}
    sizes = Sizes(lambda need: size[need.name])
    names = ["cut-1", "teacher-5", "teacher-6", "cut-2", "cut-3"]
    most, built = course_of_disk(stages, (), sizes, keep_all=True)
    assert (most, [need.name for need in built]) == (63, names)
    most, built = course_of_disk(stages, (), sizes, keep_all=False)
    assert (most, [need.name for need in built]) == (50, names)  # 13, 10 + 20 + 2, 20 + 30
    # Only the last is to run and nothing is there: all that it continues is built, and goes when it has served.
    most, built = course_of_disk(stages[2:], (), sizes, keep_all=False)
    assert (most, [need.name for need in built]) == (50, ["cut-1", "cut-2", "cut-3"])
    # What is there is not built, and what it continues is not needed.
    assert course_of_disk(stages[2:], {stages[1][0]}, sizes, keep_all=False)[1] == [stages[2][0]]
    # A ring makes a view of 5 bytes beside the others while a stage trains, and not later.
    turning = Sizes(sizes.whole, lambda need: 5 if need.name == "cut-3" else 0)
    assert course_of_disk(stages, (), turning, keep_all=True)[0] == 68
    assert course_of_disk(stages, (), turning, keep_all=False)[0] == 50  # 20 + 30 before, 30 + 5 then


# --- refusing -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_with_numbers_before_anything_runs(tmp_path: Path) -> None:
    size = one_cache()
    config = four(**{"cache.budget_gb": 2.5 * size / 1e9})
    told = (
        rf"caches of stages 1-3 with cache.views=2 make it {3 * size / 1e9:,.3g} GB of caches at once, cache.budget_gb "
        rf"= {2.5 * size / 1e9:g}; lower cache.views or data.limit, raise cache.budget_gb, set cache.keep=needed "
        rf"\({2 * size / 1e9:,.3g} GB\) or set cache.over_budget=live"
    )
    for start in (runner.run_all, costs.show_plan):
        with pytest.raises(ConfigError, match=told):
            start(job(tmp_path / "toy", config))
    assert not (tmp_path / "toy" / "stage-0").exists() and not (tmp_path / "toy" / "cache").exists()
    fits = Wanted(four(**{"cache.budget_gb": 2.5 * size / 1e9, "cache.keep": "needed"}), RunPaths(tmp_path))
    disk.refuse_what_does_not_fit(fits, 3)
    disk.refuse_what_does_not_fit(Wanted(config, fits.paths), 2)  # up to stage 2 there are two


def test_a_ring_counts_one_view_more(tmp_path: Path) -> None:
    ring = {"cache.refresh": 1, "schedule.cuts": [0, 1], "schedule.epochs": [1, 3]}
    size, more = one_cache(), one_cache(views=1)
    paths = RunPaths(tmp_path)
    with pytest.raises(ConfigError, match=r"of stages 1-1 .* raise cache.budget_gb$"):
        disk.refuse_what_does_not_fit(Wanted(toy(**FOUR | ring | {"cache.budget_gb": 1.2 * size / 1e9}), paths), 1)
    enough = {"cache.budget_gb": (size + more) / 1e9}
    disk.refuse_what_does_not_fit(Wanted(toy(**FOUR | ring | enough), paths), 1)
    never = {"schedule.epochs": [1, 1], "cache.budget_gb": size / 1e9}  # its only epoch needs no new view
    disk.refuse_what_does_not_fit(Wanted(toy(**FOUR | ring | never), paths), 1)


def test_settings_that_do_not_go_together_are_refused() -> None:
    live = {"cache.over_budget": "live"}
    with pytest.raises(ConfigError, match=r"live without cache.budget_gb leaves nothing out; set cache.budget_gb abo"):
        check(toy(**live))
    with pytest.raises(ConfigError, match=r"cache.refresh = 1 turns the views of caches, .* use cache.over_budget=ref"):
        check(toy(**live, **{"cache.refresh": 1, "cache.budget_gb": 1}))
    check(toy(**{"cache.keep": "needed", "cache.budget_gb": 1, "cache.root": "elsewhere"}))


def test_a_budget_that_holds_all_is_no_input(tmp_path: Path) -> None:
    plain, paths = Wanted(toy(), RunPaths(tmp_path)), RunPaths(tmp_path)
    wide = {"cache.budget_gb": 1.0, "cache.over_budget": "live", "cache.keep": "needed"}
    for changes in (wide, {"cache.budget_gb": 1.0}, {"cache.keep": "needed"}):
        other = Wanted(toy(**changes), paths)
        for stage in range(3):
            assert inputs_digest(other.stage_inputs(stage)) == inputs_digest(plain.stage_inputs(stage))
            assert not [name for name in plain.stage_inputs(stage) if "live" in name or "budget" in name]
        assert other.needs(2) == plain.needs(2) and other.cached_stages == (1, 2)


# --- live -----------------------------------------------------------------------------------------------------------


def test_the_stage_that_saves_least_runs_live_and_says_so(live: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = Wanted(four(2.5), RunPaths(live))
    assert wanted.cached_stages == (1, 3) and wanted.needs(2) == ()
    parts = [record(live, f"stage-{stage}") for stage in range(4)]
    assert [bool(part["cache"]) for part in parts] == [False, True, False, True]
    assert parts[2]["cut"] == 2 and parts[2]["cache_seconds"] == 0 == parts[2]["cache_seconds_elsewhere"]
    assert parts[2]["images_per_second"] == pytest.approx(parts[2]["images"] / parts[2]["train_seconds"])
    assert parts[2]["inputs"]["cache.live_stages"] == [2] == parts[3]["inputs"]["cache.live_stages"]
    assert "cache.live_stages" not in parts[1]["inputs"] and "cache.codec" not in parts[2]["inputs"]
    assert sorted(folder.name[:5] for folder in wanted.paths.cache_root.glob("cut-*")) == ["cut-1", "cut-3"]
    found = json.loads((live / "speedup.json").read_text())
    assert [row["live"] for row in found["speedup_by_stage"]] == [False, True, False]
    assert found["arms"]["cached"]["cache_seconds"] == pytest.approx(sum(part["cache_seconds"] for part in parts))
    assert {verdict.state for verdict in judge_all(wanted)} == {"current"}
    explain.show_explain(job(live, four(2.5)))
    told = " ".join(capsys.readouterr().out.split())
    assert "the 2 frozen blocks run live (cache.over_budget=live)" in told and "cache 2" not in told


def test_the_flop_bound_of_a_live_stage_counts_its_frozen_blocks(live: Path, plain: Path) -> None:
    """What a step of cut 2 saves live: the backward of two blocks, not their forward, so less than from a cache."""
    (found,) = (row for row in json.loads((live / "speedup.json").read_text())["speedup_by_stage"] if row["live"])
    cached = speedup.stage_speed(Wanted(four(), RunPaths(plain)), 2)["flop_bound"]
    assert 1 < found["flop_bound"] < cached


def test_a_live_stage_begins_with_the_loss_of_a_cached_one(live: Path, plain: Path) -> None:
    assert same(weights(live, "stage-1"), weights(plain, "stage-1"))
    mine, theirs = (record(root, "stage-2")["first_loss"] for root in (live, plain))
    assert mine == pytest.approx(theirs, rel=1e-5)  # 1e-7 here; another view differs by 5e-4
    assert not same(weights(live, "stage-2"), weights(plain, "stage-2")), "float16 rounds only one of them"
    assert not same(weights(live, "stage-2"), weights(live, "stage-1"))
    assert same(weights(live, "stage-2"), weights(live, "stage-1"), start="blocks.1."), "frozen"


def test_the_cut_after_a_live_stage_continues_the_nearest_earlier_cache(live: Path) -> None:
    wanted = Wanted(four(2.5), RunPaths(live))
    specs = [wanted.cache_spec(stage) for stage in (1, 3)]
    assert wanted.features(3).parent == wanted.features(1) and wanted.features(3).start == 1
    manifests = [read_manifest(wanted.cache_folder(spec)) for spec in specs if spec]
    assert manifests[1].spec.parent == manifests[0].fingerprint and manifests[0].spec.parent == ""
    equivalence.run_equivalence(job(live, four(2.5)))


def test_a_live_stage_goes_on_to_the_bit(live: Path, tmp_path: Path) -> None:
    root = shutil.copytree(live, tmp_path / "toy")
    shutil.rmtree(root / "stage-2")
    for asked in (1, 2):
        with pytest.raises(Interrupted, match=f"stage 2 is saved at step {asked}"):
            runner.run_stage(job(root, four(2.5), target=2, stop=StopAfter(0)))
    runner.run_stage(job(root, four(2.5), target=2))
    assert same(weights(live, "stage-2"), weights(root, "stage-2"))
    assert record(live, "stage-2")["final_loss"] == record(root, "stage-2")["final_loss"]


def test_clearing_up_keeps_what_the_stages_need_now(plain: Path, tmp_path: Path) -> None:
    root = shutil.copytree(plain, tmp_path / "toy")
    care.run_gc(job(root, four(), yes=True))
    wanted = Wanted(four(), RunPaths(root))
    kept = [wanted.cache_folder(spec) for stage in (1, 2, 3) if (spec := wanted.cache_spec(stage))]
    assert sorted(wanted.paths.cache_root.glob("cut-*")) == sorted(kept) and len(kept) == 3
    care.run_gc(job(root, four(2.5), yes=True))  # stage 2 would run live, and stage 3 read what continues stage 1's
    assert list(wanted.paths.cache_root.glob("cut-*")) == kept[:1]


# --- keeping what is needed -----------------------------------------------------------------------------------------


def test_a_cache_goes_once_no_stage_to_run_needs_it(needed: tuple[Path, list[str]], finished: Path) -> None:
    root, lines = needed
    assert not list((root / "cache").glob("cut-*"))
    assert all(same(weights(root, f"stage-{stage}"), weights(finished, f"stage-{stage}")) for stage in range(3))
    steps = [line for line in lines if "removed" in line or line.startswith("cache 2: built") or "stage 2: m" in line]
    assert [line.partition(" (")[0].partition(" in ")[0] for line in steps] == [
        "stage 2: missing",
        "cache 2: built",
        "cache 1: removed, no stage still to run needs it",
        "cache 2: removed, no stage still to run needs it",
    ]
    rows = json.loads((root / "speedup.json").read_text())["speedup_by_stage"]
    assert [row["cut"] for row in rows] == [1, 3] and all(row["cached_images_per_second"] > 0 for row in rows)
    kept = json.loads((root / "stage-1" / "speed.json").read_text())
    assert kept["flop_bound"] == rows[0]["flop_bound"] and kept["of"] == record(root, "stage-1")["state"]


def test_a_stage_whose_caches_have_gone_is_still_right(needed: tuple[Path, list[str]], tmp_path: Path) -> None:
    root = shutil.copytree(needed[0], tmp_path / "toy")
    before, config = record(root, "stage-2"), toy(**{"cache.keep": "needed"})
    states = {verdict.what: verdict for verdict in judge_all(Wanted(config, RunPaths(root)))}
    assert states["cache 1"].reason == "not needed, stage 1 is current" and states["stage 2"].current
    shutil.rmtree(root / "stage-2")
    runner.run_stage(job(root, config, target=2))
    after = record(root, "stage-2")
    assert after["cache"] == before["cache"] and same(weights(root, "stage-2"), weights(needed[0], "stage-2"))
    assert not list((root / "cache").glob("cut-*"))
    runner.run_cache(job(root, config, target=2))  # asked for by name it is there, without what it continues
    assert [folder.name[:5] for folder in (root / "cache").glob("cut-*")] == ["cut-3"]
    care.run_verify(job(root, config))


def test_repair_does_not_let_go_of_what_it_mends(needed: tuple[Path, list[str]], tmp_path: Path) -> None:
    root, config = shutil.copytree(needed[0], tmp_path / "toy"), toy(**{"cache.keep": "needed"})
    runner.run_cache(job(root, config, target=2))
    (folder,) = (root / "cache").glob("cut-3-*")
    victim = folder / "data.zarr/view_1/features/c/1/0/0"
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-1])
    care.run_repair(job(root, config))
    assert victim.read_bytes() == whole


def test_what_another_run_uses_stays(tmp_path: Path) -> None:
    two = {"data.limit": 48, "schedule.cuts": [0, 2], "schedule.epochs": [1, 1], "eval.train_limit": 24}
    store = tmp_path / "store"

    def run(name: str, keep: str, stage: int = 1) -> list[str]:
        config, paths = toy(**two | {"cache.keep": keep}), RunPaths(tmp_path / name, store)
        if (tmp_path / "all").exists() and not paths.root.exists():  # what it has trained is the same
            shutil.copytree(tmp_path / "all" / "stage-0", paths.root / "stage-0")
        with told() as lines:
            runner.run_stage(replace(job(paths.root, config, target=stage), paths=paths))
        return lines

    def kept(name: str) -> str:
        return f"cache 1: kept, used by {tmp_path / name} (cache.keep=needed)"

    run("all", "all")
    (folder,) = store.glob("cut-2-*")
    assert kept("all") in run("mine", "needed") and folder.exists()
    run("later", "needed", stage=0)
    shutil.rmtree(tmp_path / "all")
    assert kept("later") in run("mine", "needed") and folder.exists(), "another run has still to read it"
    run("later", "needed")
    assert not folder.exists(), "whoever is the last to need it, removes it"
    assert record(tmp_path / "later", "stage-1")["cache"] == record(tmp_path / "mine", "stage-1")["cache"]
