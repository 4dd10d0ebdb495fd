"""Views of a ring that are made while training reads: nothing that is trained changes, neither side runs away from the
other, and whoever is stopped or killed costs no bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

from cache.reader import RowReader
from pipeline import ring, runner, sharing, work
from pipeline.__main__ import main
from pipeline.ahead import Ahead
from pipeline.decide import Wanted
from pipeline.desk import Desk
from pipeline.events import EventLog
from pipeline.job import Interrupted
from pipeline.layout import RunPaths
from pipeline.replay import rows_of
from pipeline.story import read_story
from pipeline.tables import parts_table
from stages import encode, sources
from stages.replay import Replay
from tests.pipeline.test_pipeline_run import StopAfter
from tests.pipeline.toy import job, record, same, toy, weights
from tests.pipeline.workers import CONTEXT, cluster_of, instead, killed_once, until

RING = {"cache.refresh": 1, "schedule.epochs": [1, 3, 2], "train.drop_path": 0.2}
AHEAD = RING | {"cache.refresh_ahead": 1}
SHARDS = 3


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose training waits for every view."""
    root = tmp_path_factory.mktemp("straight")
    runner.run_stage(job(root, toy(**RING), target=1))
    return root


@pytest.fixture
def begun(straight: Path, tmp_path: Path) -> Path:
    """The same after stage 0."""
    root = tmp_path / "toy"
    root.mkdir()
    shutil.copytree(straight / "stage-0", root / "stage-0")
    shutil.copytree(straight / "index", root / "index")
    return root


def refreshes(root: Path) -> list[dict]:
    events = map(json.loads, (root / "events.jsonl").read_text().splitlines())
    return [event for event in events if "refresh_wait_seconds" in event]


def feature_files(root: Path) -> int:
    """Different files of features: one for each shard of each view, however many caches share it."""
    found = set()
    for path in (root / "cache").glob("cut-*/data.zarr/view_*/features/c/**/*"):
        try:
            found |= {path.stat().st_ino} if path.is_file() and ".tmp" not in path.name else set()
        except FileNotFoundError:
            continue
    return len(found)


def test_views_made_beside_training_change_no_bit_and_are_no_more_than_allowed(
    straight: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every view that is made ahead waits until a step of the generation before it was loaded: training goes on."""
    plain_write, plain_load, plain_read = encode.write_rows, sources.CachedFeatures.load, RowReader.read
    plain_train = work.train_arm
    ahead, reads, most, furthest, rows_read = 2, 0, [0], [], {}
    moved, trained = threading.Condition(), threading.Event()

    def load(self: sources.CachedFeatures, *args: object) -> object:
        nonlocal reads
        with moved:
            reads = self.cache.manifest.spec.first_view
            moved.notify_all()
        return plain_load(self, *args)

    def write(folder: Path, layout: object, *args: object) -> object:
        first = layout.spec.first_view
        if first:
            with moved:
                assert moved.wait_for(lambda: reads >= first - ahead, 30), "training stands still"
            furthest.append(first - reads)
        done = plain_write(folder, layout, *args)
        most.append(feature_files(begun))
        return done

    def read(self: RowReader, rows: np.ndarray, view: int = 0, *more: object) -> object:
        if not trained.is_set():
            rows_read.setdefault(self.manifest.spec.view_at(view), []).append(rows.tolist())
        return plain_read(self, rows, view, *more)

    def train(*asked: object) -> object:
        done = plain_train(*asked)
        trained.set()
        return done

    monkeypatch.setattr(encode, "write_rows", write)
    monkeypatch.setattr(sources.CachedFeatures, "load", load)
    monkeypatch.setattr(RowReader, "read", read)
    monkeypatch.setattr(work, "train_arm", train)
    config = toy(**RING | {"cache.refresh_ahead": ahead})
    runner.run_stage(job(begun, config, target=1))
    assert same(weights(straight, "stage-1"), weights(begun, "stage-1"))
    assert record(straight, "stage-1")["read"] == record(begun, "stage-1")["read"]
    assert len(furthest) == 2 * SHARDS and max(furthest) <= ahead
    assert (2 + 1) * SHARDS <= max(most) <= (2 + ahead) * SHARDS
    assert len(list((begun / "cache").glob("cut-*"))) == 1, "what is not read any more is gone"
    assert record(straight, "stage-1")["inputs"] == record(begun, "stage-1")["inputs"]
    assert_order(record(begun, "stage-1"), rows_read)
    assert [one["generation"] for one in refreshes(begun)] == [1, 2], "what is measured afterwards turns nothing"


def assert_order(found: dict, rows_read: dict[int, list[list[int]]]) -> None:
    """What is recorded, and computed again from the record, is what was asked of the caches, batch by batch."""
    how, named = Replay.of(found["inputs"]), ("epoch", "view", "generation", "group", "first", "steps", "samples")
    told = [tuple(one[name] for name in named) for one in found["read"]]
    assert told == [(1, 1, 0, 0, 0, 6, 96), (2, 2, 1, 1, 0, 6, 96), (3, 3, 2, 1, 0, 6, 96)]
    assert sorted(rows_read) == [1, 2, 3]
    for one in found["read"]:
        batches = np.array(list(rows_of(how, one))).reshape(6, 16).tolist()
        assert sorted(batches) == sorted(rows_read[one["view"]])
        assert how.epoch(one) == one


def test_waiting_is_a_figure_of_its_own(straight: Path, begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every view is written no sooner than 0.1 s after training has begun to wait for it."""
    plain_write, plain_wait = encode.write_rows, Ahead.wait
    waited_for = {generation: threading.Event() for generation in range(3)}

    def write(folder: Path, layout: object, *args: object) -> object:
        if generation := layout.spec.first_view:
            assert waited_for[generation].wait(60)
            threading.Event().wait(0.1)
        return plain_write(folder, layout, *args)

    def wait(self: Ahead, generation: int) -> None:
        waited_for[generation].set()
        plain_wait(self, generation)

    monkeypatch.setattr(encode, "write_rows", write)
    monkeypatch.setattr(Ahead, "wait", wait)
    runner.run_stage(job(begun, toy(**AHEAD), target=1))
    told = refreshes(begun)
    assert [(one["epoch"], one["generation"], one["new_view"]) for one in told] == [(2, 1, 2), (3, 2, 3)]
    assert all(one["refresh_wait_seconds"] >= 0.1 for one in told)
    total = sum(one["refresh_wait_seconds"] for one in told)
    assert record(begun, "stage-1")["refresh_wait_seconds"] == pytest.approx(total, abs=1e-6)
    assert record(straight, "stage-1")["refresh_wait_seconds"] > 0
    assert "refresh_wait_seconds" not in record(begun, "stage-0")
    (row,) = [cells for label, cells in parts_table(read_story(RunPaths(begun))).rows if "turns of the ring" in label]
    assert [(cell.text, cell.source) for cell in row] == [
        ("–", ""),
        (f"{total:.2f}", "stage-1/stage.json#refresh_wait_seconds"),
    ]


def test_a_ring_made_ahead_is_stopped_anywhere_and_goes_on_to_the_bit(straight: Path, begun: Path) -> None:
    stops = 0
    for asked in (1, 4, 9, 14, 7, 11):
        try:
            runner.run_stage(job(begun, toy(**AHEAD), target=1, stop=StopAfter(asked)))
        except Interrupted:
            stops += 1
    runner.run_stage(job(begun, toy(**AHEAD), target=1))
    assert stops > 2
    assert same(weights(straight, "stage-1"), weights(begun, "stage-1"))
    assert record(straight, "stage-1")["read"] == record(begun, "stage-1")["read"]
    left = [folder.name for folder in (begun / "cache").glob("cut-*")]
    assert left == [folder.name for folder in (straight / "cache").glob("cut-*")]


def train_and_be_killed(root: Path) -> None:
    """Trains stage 1, and is killed while the first view is made ahead, of which one shard is written, and before the
    step that is the fifth."""
    plain, plain_load = encode.write_rows, sources.CachedFeatures.load

    def write(folder: Path, layout: object, *args: object) -> object:
        done = plain(folder, layout, *args)
        if layout.spec.first_view:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    def load(self: sources.CachedFeatures, segment: object, step: int, *into: object) -> object:
        if step == 4:
            threading.Event().wait(60)
        return plain_load(self, segment, step, *into)

    encode.write_rows, sources.CachedFeatures.load = write, load
    runner.run_stage(job(root, toy(**AHEAD | {"train.save_every": 0.001}), target=1))


def test_a_trainer_that_is_killed_while_a_view_is_made_goes_on_to_the_bit(
    straight: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no model is made beside training, whose random numbers come from where a model's first weights do."""
    plain, makers = encode.build_encoder, []

    def build_encoder(*asked: object, **named: object) -> object:
        makers.append(threading.current_thread())
        return plain(*asked, **named)

    monkeypatch.setattr(encode, "build_encoder", build_encoder)
    process = CONTEXT.Process(target=train_and_be_killed, args=(begun,))
    process.start()
    process.join(120)
    if process.is_alive():
        process.terminate()
    assert process.exitcode == -signal.SIGKILL
    assert len(list((begun / "cache").glob("cut-*"))) == 2, "the next generation is half made"
    used = sharing.used(Wanted(toy(**AHEAD), RunPaths(begun)))
    assert used >= set((begun / "cache").glob("cut-*")), "gc keeps it for the run that goes on"
    runner.run_stage(job(begun, toy(**AHEAD), target=1))
    assert makers == [threading.main_thread()]
    assert same(weights(straight, "stage-1"), weights(begun, "stage-1"))
    assert record(straight, "stage-1")["read"] == record(begun, "stage-1")["read"]


def test_an_encoder_that_is_killed_is_replaced_by_another(
    straight: Path, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, made = ring.build_cache, []

    def build(desk: object, need: object, paths: object, beside: ring.Beside | None = None) -> None:
        if beside:
            made.append(need.draft.first_view)
            beside = ring.Beside(instead(beside.run, killed_once), beside.threads)
        plain(desk, need, paths, beside)

    monkeypatch.setattr(ring, "build_cache", build)
    with cluster_of(begun.parent, workers=2) as cluster:
        runner.run_stage(job(begun, toy(**AHEAD | {"cluster.address": cluster.address}), target=1))
        until(lambda: sum(not process.is_alive() for process in cluster.others) == 1)
    assert made == [1, 2]
    assert same(weights(straight, "stage-1"), weights(begun, "stage-1"))


def test_what_fails_ahead_is_told_at_once_and_made_when_training_needs_it(
    straight: Path, begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ring.build_cache

    def build(desk: object, need: object, paths: object, beside: ring.Beside | None = None) -> None:
        if beside:
            raise OSError("no room")
        plain(desk, need, paths)

    monkeypatch.setattr(ring, "build_cache", build)
    runner.run_stage(job(begun, toy(**AHEAD), target=1))
    told = capsys.readouterr().out
    assert "generation 1 of the ring of views: no room; tried again when training needs it" in told
    assert same(weights(straight, "stage-1"), weights(begun, "stage-1"))


def test_a_stage_that_ends_early_leaves_nothing_that_was_made_ahead(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = []
    plain = sharing.remove_cache
    monkeypatch.setattr(sharing, "remove_cache", lambda folder: removed.append(folder.name) or plain(folder))
    asked = job(begun, toy(**AHEAD))
    log = EventLog(asked.paths.events, show=False)
    with log, ring.ring_of(Desk(asked, Wanted(asked.config, asked.paths), log), 1) as found:
        segment = found.desk.wanted.asked(1)[0]
        found.turn(segment)
        until(lambda: len(list((begun / "cache").glob("cut-*/manifest.json"))) == 2)
    assert len(removed) == 1 and len(list((begun / "cache").glob("cut-*"))) == 1
    (left,) = (begun / "cache").glob("cut-*")
    assert json.loads((left / "manifest.json").read_text())["spec"].get("first_view", 0) == 0


# --- the order --------------------------------------------------------------------------------------------------------


def test_verify_prints_the_order_and_finds_another(
    straight: Path, begun: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["verify", "--config", str(straight / "config.toml"), "--run", str(straight), "--order"]
    assert main([*args, "all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(", order")[0] for line in lines] == [
        "stage 0: epoch 0: view 0, group 0, 6 steps",
        "stage 1: epoch 1: generation 0, view 1, group 0, 6 steps",
        "stage 1: epoch 2: generation 1, view 2, group 1, 6 steps",
        "stage 1: epoch 3: generation 2, view 3, group 1, 6 steps",
    ]
    assert all("as recorded; rows " in line and line.endswith(" ...") for line in lines)
    assert main([*args, "2"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert sorted(map(int, line.partition("rows ")[2].split())) == list(range(96))
    assert main([*args, "7"]) == 2 and main([*args, "x"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert "no finished stage or arm has trained epoch 7" in told[0] and "neither `all` nor an epoch" in told[1]
    plain = sources.batch_rows
    monkeypatch.setattr(sources, "batch_rows", lambda *asked: np.roll(plain(*asked), 1))
    runner.run_stage(job(begun, toy(**AHEAD), target=1))
    assert main(["verify", "--config", str(begun / "config.toml"), "--run", str(begun), "--order", "all"]) == 1
    told = capsys.readouterr()
    assert told.out.count("NOT as recorded (order: ") == 3 and "3 of 4 epochs were not trained" in told.err
