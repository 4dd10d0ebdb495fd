"""The cache benchmark's own logic on small arrays: orders, ratios, answers of peers. The peers themselves are no
dependency of any test."""

from __future__ import annotations

import json
import profile
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from pipeline import bench_cache, bench_others, peers
from pipeline.bench_cache import BASE, run_rounds, summary
from pipeline.bench_others import PeerFailed, parsed
from pipeline.bench_ways import Rounds, Setting, Way
from pipeline.config import BenchConfig


def test_an_epoch_reads_every_row_once_and_its_order_is_the_seeds() -> None:
    epochs = [np.concatenate(peers.batches(10, 4, seed)) for seed in (0, 0, 1)]
    assert [len(rows) for rows in peers.batches(10, 4, 0)] == [4, 4, 2]
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert epochs[0].tolist() == epochs[1].tolist() != epochs[2].tolist()
    read: list[int] = []
    peers.by_rows([lambda rows: read.extend(rows.tolist())] * 2, 10, 4)(1)
    assert sorted(read) == list(range(10))


def test_rounds_alternate_after_one_that_warms_and_the_second_epoch_counts() -> None:
    calls: list[str] = []

    def way(name: str) -> Way:
        def read(seed: int) -> float:
            calls.append(f"{name}{seed}")
            return float(seed)

        return Way(lambda: calls.append(name) or 7.0, read, "", "", True, 2)

    found = run_rounds({"a": way("a"), "b": way("b"), "c": Way(lambda: 1.0, None, "", "", True, 2)}, rounds=2)
    assert " ".join(calls) == "a a0 a1 b b0 b1 b b2 b3 a a2 a3 a a4 a5 b b4 b5"
    assert found["a"] == found["b"] == ([7.0, 7.0], [3.0, 5.0]) and found["c"] == ([1.0, 1.0], [])


def test_ratios_are_taken_within_a_round_and_rates_count_what_is_read() -> None:
    config = BenchConfig(rows=100)
    ways = {BASE: Way(float, float, "", "", True, 4), "half": Way(float, float, "", "", True, 2, share=0.5)}
    ways["unread"] = Way(float, None, "", "", True, 2)
    rounds = {BASE: Rounds([1, 2], [2, 4]), "half": Rounds([3, 1], [1, 1]), "unread": Rounds([1, 1], [])}
    found = summary(ways, rounds, config)
    assert found["half"]["write_ratio"] == [3, 0.5] and found["half"]["read_ratio"] == [0.5, 0.25]
    assert found["half"]["read_samples_per_second"] == [100, 100]
    assert found["half"]["read_gb_per_second"] == pytest.approx([100 * 196 * 768 * 0.5 * 2 / 1e9] * 2)
    assert found[BASE]["read_ratio"] == [1, 1] and found["unread"]["read_ratio"] == []


def test_answers_of_peers(tmp_path: Path) -> None:
    assert parsed('{"seconds": 0.5}\n') == 0.5
    with pytest.raises(PeerFailed, match="ended without an answer"):
        parsed("")
    with pytest.raises(PeerFailed, match="ImportError: no streaming"):
        parsed(json.dumps({"error": "ImportError: no streaming"}))
    read: list[int] = []
    peer = (lambda: tmp_path.joinpath("x").mkdir(), lambda threads: read.append)
    found = list(peers.answers(peer, tmp_path / "x", 1, ["write", "read 3", "write", "read 4"]))
    assert [list(answer) for answer in found] == [["seconds"]] * 4 and read == [12, 13, 14, 15, 16, 17, 18, 19]


def test_a_peer_that_cannot_run_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_others, "PEERS_PYTHON", Path(sys.executable))
    np.save(tmp_path / "features.npy", np.zeros((2, 3, 4), np.float16))
    setting = Setting(np.zeros((2, 3, 4), np.float32), tmp_path, BenchConfig())
    with (
        bench_others.peer("litdata", tmp_path / "features.npy", setting, Path(sys.executable)) as ask,
        pytest.raises(PeerFailed, match="No module named 'litdata'"),
    ):
        ask("write")
    with ExitStack() as stack:
        assert bench_others.foreign(setting, stack) == {}
    assert "without litdata: ModuleNotFoundError" in capsys.readouterr().out


def test_a_peer_gets_the_standard_librarys_modules_and_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "litdata").mkdir()
    (tmp_path / "litdata" / "__init__.py").write_text("import profile\nraise ImportError(profile.__file__)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    np.save(tmp_path / "features.npy", np.zeros((2, 3, 4), np.float16))
    setting = Setting(np.zeros((2, 3, 4), np.float32), tmp_path, BenchConfig())
    with (
        bench_others.peer("litdata", tmp_path / "features.npy", setting, Path(sys.executable)) as ask,
        pytest.raises(PeerFailed) as failed,
    ):
        ask("write")
    assert str(failed.value) == f"ImportError: {profile.__file__}"


def test_the_benchmark_runs_on_a_few_rows_without_the_peers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_others, "PEERS_PYTHON", tmp_path / "none")
    for module in (bench_cache, bench_others):
        monkeypatch.setattr(module, "SHAPE", (196, 64), raising=False)
    found = bench_cache.bench_cache(BenchConfig(rows=192, rounds=1, batch=4, shard_rows=16, threads=1), tmp_path)
    assert {"np.memmap", "zarr-python", "webdataset", *bench_cache.CODECS} < found["ways"].keys()
    unread = "zarr-python from float32", "permafrost float16, shards alone"
    for name, way in found["ways"].items():
        assert len(way["write_ratio"]) == 1 and way["write_samples_per_second"][0] > 0, name
        assert len(way["read_ratio"]) == (name not in unread), name
    assert 4e-3 < found["errors"]["permafrost int8"] < 7e-3
    assert len(found["memory"]["curve"]) == 96
    assert "without Streaming, LitData and tcache" in capsys.readouterr().out
    assert not list(tmp_path.iterdir()), "nothing is left"
