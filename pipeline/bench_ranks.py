"""`python -m pipeline.bench_ranks`: how training scales over ranks of this machine. The same step, of the same batch,
by one rank and by several, in turn within each round, on batches that lie in memory: what is left is computing and
averaging gradients."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from cache.rank import Rank
from pipeline.config import PipelineConfig
from pipeline.decide import Wanted
from pipeline.feeds import live_source
from pipeline.layout import RunPaths
from pipeline.machine import resolve
from pipeline.rates import InMemory, fresh_model
from pipeline.reading import load_config
from pipeline.show import console, spread, table
from pipeline.work import optimizer_of
from stages.device import synchronize
from stages.ranks import Ranks, of_rank
from stages.team import SOLO, Team
from stages.train import train_step

BATCHES = 4
"""Batches in memory, trained on in turn."""
Rounds = dict[str, list[float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 0."""
    parser = argparse.ArgumentParser("python -m pipeline.bench_ranks", description=__doc__)
    parser.add_argument("--config", default="sample", help="recipe or TOML file whose first stage is trained")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings")
    parser.add_argument("--ranks", type=int, default=2, help="how many ranks are compared with one")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement in a round")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(sys.argv[1:] if argv is None else argv)
    _, config = load_config(asked.config, asked.set)
    found = measure(resolve(config), asked.ranks, asked.seconds, asked.rounds)
    show(found, asked.ranks)
    return 0


def measure(config: PipelineConfig, ranks: int, seconds: float, rounds: int) -> Rounds:
    """images/s by round: of one rank with its share of the threads, of all ranks, of one with all threads."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawning = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        results = spawning.SimpleQueue()
        given = (ranks, port, config, Path(folder), seconds, rounds, results)
        others = [spawning.Process(target=_rank, args=(rank, *given)) for rank in range(ranks)]
        for process in others:
            process.start()
        for process in others:
            process.join()
        if any(process.exitcode for process in others):
            raise RuntimeError("a rank of the benchmark has failed; what it said stands above")
        found: Rounds = results.get()
    return found


def _rank(
    rank: int,
    ranks: int,
    port: int,
    config: PipelineConfig,
    folder: Path,
    seconds: float,
    rounds: int,
    results: multiprocessing.SimpleQueue[Rounds],
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = config.train.device
    if device == "cuda":
        torch.cuda.set_device(rank)
        config = replace(config, train=replace(config.train, device=f"cuda:{rank}"))
    dist.init_process_group("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")
    team = Ranks(Rank(rank, ranks), ranks)
    wanted = Wanted(config, RunPaths(folder / str(rank)))
    share, every = team.threads(config.train.threads), config.train.threads
    together = Pacer(wanted, team, share)
    alone = [Pacer(wanted, SOLO, share), Pacer(wanted, SOLO, every)] if team.leads else []
    found: Rounds = {name: [] for name in ("share", "ranks", "whole")}
    for number in range(rounds + 1):  # the first one warms
        order = ("share", "ranks", "whole") if number % 2 else ("whole", "ranks", "share")
        for name in order:
            team.told(None)  # the others wait while one rank has the machine
            rate = 0.0
            if name == "ranks":
                rate = together(seconds)
            elif team.leads:
                rate = alone[name == "whole"](seconds)
            if number:
                found[name].append(rate)
    if team.leads:
        results.put(found)
    dist.destroy_process_group()


class Pacer:
    """images/s of the first stage's step, all ranks of a team together."""

    def __init__(self, wanted: Wanted, team: Team, threads: int) -> None:
        torch.set_num_threads(threads)
        self.team, self.threads, self.train = team, threads, wanted.config.train
        segment = wanted.segments[0]
        self.model, _ = fresh_model(wanted, 0, 0, cached=False)
        team.take(self.model, self.train)
        self.optimizer = optimizer_of(wanted, self.model)
        source = live_source(wanted, segment)
        if team.rank.ranks > 1:
            source = of_rank(source, team.rank, self.train.accumulate)
        self.source = InMemory.of(source, segment, BATCHES, self.train.device)

    def __call__(self, seconds: float) -> float:
        torch.set_num_threads(self.threads)
        self.steps(1)
        steps = self.team.told(max(2, round(seconds / self.steps(1))))
        return steps * self.train.batch_size / self.steps(steps)

    def steps(self, number: int) -> float:
        """Seconds of so many steps."""
        start = time.perf_counter()
        for step in range(number):
            inputs = self.source.batches[step % BATCHES]
            train_step(self.model, self.optimizer, self.source, inputs, self.train, self.team)
        synchronize(torch.device(self.train.device))
        return time.perf_counter() - start


def show(found: Rounds, ranks: int) -> None:
    """Print rates and, by round, their ratios."""
    rows = table("ranks", "images/s, median", "efficiency")
    efficiency = [many / (ranks * one) for many, one in zip(found["ranks"], found["share"], strict=True)]
    rows.add_row("1, with its share of the threads", f"{statistics.median(found['share']):.1f}", "1.00")
    rows.add_row(str(ranks), f"{statistics.median(found['ranks']):.1f}", spread(efficiency))
    rows.add_row("1, with all threads", f"{statistics.median(found['whole']):.1f}", "")
    out = console()
    out.print(rows)
    beside = [many / one for many, one in zip(found["ranks"], found["whole"], strict=True)]
    out.print(f"efficiency: {ranks} ranks over {ranks} times one rank with as many threads as each of them has")
    out.print(f"{ranks} ranks over one process with all threads: {spread(beside)}")


if __name__ == "__main__":
    sys.exit(main())
