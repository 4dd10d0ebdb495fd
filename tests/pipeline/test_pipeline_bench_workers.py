"""Encoding by one worker and by several: the same shards, each worker on a core of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import bench_workers
from pipeline.bench_workers import main, measure, show
from pipeline.decide import Wanted
from pipeline.layout import RunPaths
from tests.pipeline.toy import toy


@pytest.mark.slow
def test_two_workers_make_the_shards_that_one_makes(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever number of workers: what is written is the run's own cache."""
    wanted, written = Wanted(toy(), RunPaths(finished)), []
    encoded = bench_workers.encoded

    def kept(run, job, shards):
        rate = encoded(run, job, shards)
        written.append({file.name: file.read_bytes() for file in Path(job.folder).rglob("receipts/*")})
        return rate

    monkeypatch.setattr(bench_workers, "encoded", kept)
    found = measure(wanted, 2, shards=2, rounds=1)
    assert found.keys() == {1, 2} and all(len(rates) == 1 and rates[0] > 0 for rates in found.values())
    assert len(written) == 4 and all(len(one) == 2 and one == written[0] for one in written)


def test_efficiency_is_the_rate_of_many_over_that_of_one_and_their_number(capsys: pytest.CaptureFixture[str]) -> None:
    show({1: [10.0, 20.0, 30.0], 4: [20.0, 80.0, 60.0]}, 4)
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["1", "20.0", "1.00"] and out[2].split() == ["4", "60.0", "0.50", "(0.50-1.00)"]


def test_what_cannot_be_measured_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.toml").write_text("")
    for more, said in ((["--workers", "999"], "--workers 999 of"), ([], "has no trained stage")):
        assert main(["--run", str(tmp_path), *more]) == 2
        told = capsys.readouterr().err
        assert said in told and told.startswith("permafrost: ") and told.count("\n") == 1
