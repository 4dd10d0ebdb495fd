"""What is left to the machine, device, precision and threads, filled in; and the machine as records describe it. Torch
is imported only to find the former out."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import MutableMapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from dask.system import cpu_count

from pipeline import __version__
from pipeline.config import PipelineConfig

VERSIONS = ("torch", "timm", "zarr", "numpy")
SPIN = "3000"
"""Turns that a thread of OpenMP looks for work before it lets others have its core. GNU's 300,000 are milliseconds, in
which two runs on one machine keep each other's threads from the cores that both wait for (docs/SPEED.md)."""


def wait_briefly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has OpenMP's idle threads soon let go of their core. GNU's OpenMP reads this when torch is loaded, so it must be
    called before; what somebody has set stays."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & environment.keys():
        environment["GOMP_SPINCOUNT"] = SPIN


def resolve(config: PipelineConfig, previous: PipelineConfig | None = None, detect: bool = True) -> PipelineConfig:
    """Fills in what is left to the machine: train.device, train.precision and train.threads.

    previous: the settings with which the run began; what they hold is kept, so that a run goes on as it started.
    detect: without it nothing is looked up with torch, and what previous does not hold stays `auto`.
    """
    train = config.train
    if previous is not None:
        kept = {name: getattr(previous.train, name) for name in ("device", "precision", "threads")}
        train = dataclasses.replace(
            train, **{name: value for name, value in kept.items() if getattr(train, name) in ("auto", 0)}
        )
    if not train.threads:
        train = dataclasses.replace(train, threads=available_cores())
    if detect and "auto" in (train.device, train.precision):
        device = _device() if train.device == "auto" else train.device
        precision = _precision(device) if train.precision == "auto" else train.precision
        train = dataclasses.replace(train, device=device, precision=precision)
    return dataclasses.replace(config, train=train)


def described(config: PipelineConfig, ranks: int = 1) -> dict[str, Any]:
    """The machine, and with what the numbers of a record, its seconds among them, were made on it. ranks: processes
    that train together."""
    train = config.train
    return {
        "device": f"{train.device} ({hardware(train.device)})",
        "precision": train.precision,
        "threads": train.threads,
        "compile": train.compile,
        "attention": config.model.attention,
        "loader_threads": train.loader_threads,
        "prefetch": train.prefetch,
        "versions": {"permafrost": __version__, "python": platform.python_version()}
        | {name: version(name) for name in VERSIONS},
    } | ({"ranks": ranks, "parallel": train.parallel} if ranks > 1 else {})


def hardware(device: str) -> str:
    """The processor's name, and before it that of the GPU that computes: a host may have several kinds."""
    if device.startswith("cuda"):
        import torch

        if torch.cuda.is_available():
            return f"{torch.cuda.get_device_name(device)}, {processor()}"
    return processor()


def processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def whole_machine() -> bool:
    """Whether all cores of the machine are this process's to use. Where they are not, in a container or under an
    affinity, what other work takes of the machine says nothing of those that are."""
    return available_cores() >= (psutil.cpu_count() or 1)


def available_cores() -> int:
    """The cores that this process may use: a container often gives it fewer than the machine has, by affinity or, as
    Docker and Kubernetes do, by a share of time, in which a thread for every core of the machine would stand still."""
    return cpu_count()


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _precision(device: str) -> Any:
    import torch

    if device.startswith("cuda"):
        fast = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        fast = any(getattr(torch.cpu, name, bool)() for name in names)
    return "bfloat16" if fast else "float32"
