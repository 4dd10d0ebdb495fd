"""What a bit-identical resume needs, in one file: weights, the optimiser's memory and the progress made. A state is
written atomically while a stage trains; the final one is where the next stage, or a baseline arm, starts from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cache.checksum import Checksum
from cache.manifest import atomic_write
from models.learner import Learner
from stages.optim import ScheduleFree

STATE_VERSION = 2


class CheckpointError(ValueError):
    """A saved state that cannot be used."""


@dataclass
class SegmentTotals:
    """What one segment has cost and brought so far. Seconds are wall-clock; `train_seconds` include waiting."""

    train_seconds: float = 0.0
    loader_wait_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    images: int = 0
    steps: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    first_loss: float | None = None
    crowded_seconds: float | None = None
    """Of `train_seconds`, lost to other work on the machine's cores; None where nobody measured."""

    @property
    def mean_loss(self) -> float | None:
        """Mean training loss of the current, or last, epoch."""
        return self.loss_sum / self.loss_steps if self.loss_steps else None


@dataclass
class Progress:
    """Where an arm stands. `segment` is the one in training, `step` its optimiser steps done."""

    segment: int = 0
    step: int = 0
    totals: list[SegmentTotals] = field(default_factory=list)
    curve: list[dict[str, float | None]] = field(default_factory=list)
    checks: list[dict[str, float]] = field(default_factory=list)
    """Adaptive freezing: what every check of the blocks before the next cut has measured."""
    ended: dict[str, Any] | None = None
    """Why and at which epoch the arm ended before its segments did."""
    read: list[dict[str, Any]] = field(default_factory=list)
    """Epoch by epoch what was trained on, as `replay.note` keeps it."""

    @property
    def train_seconds(self) -> float:
        return sum(totals.train_seconds for totals in self.totals)

    @property
    def crowded_seconds(self) -> float | None:
        """Of all segments that measured it; an earlier version did not."""
        found = [totals.crowded_seconds for totals in self.totals if totals.crowded_seconds is not None]
        return sum(found) if found else None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Progress:
        plain: dict[str, Any] = json.loads(text)
        plain["totals"] = [SegmentTotals(**totals) for totals in plain["totals"]]
        return cls(**plain)


def model_tensors(model: Learner, optimizer: torch.optim.Optimizer, keep: bool = True) -> dict[str, Tensor]:
    """Weights under `<part>/`, such as `encoder/` and `decoder/`, moments under `optim/<parameter>/<moment>`, and what
    a schedule-free group remembers under `optim/<parameter>/scalars`, float64, for each of its parameters.

    All are whole, whatever the number of ranks: of a model that is spread over ranks every rank must call this, and
    those that do not `keep` get nothing.
    """
    tensors: dict[str, Tensor] = {
        f"{part}/{name}": value for part, module in model.parts.items() for name, value in module.state_dict().items()
    }
    for name, parameter in model.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optim/{name}/{moment}"] = value
    if isinstance(optimizer, ScheduleFree):
        names = {parameter: name for name, parameter in model.named_parameters()}
        for parameter, values in optimizer.scalars().items():
            tensors[f"optim/{names[parameter]}/scalars"] = torch.tensor(values, dtype=torch.float64)
    found = {}
    for name, value in tensors.items():
        whole = whole_tensor(value)
        if keep:
            found[name] = whole.detach().cpu().contiguous()
    return found


def whole_tensor(value: Tensor) -> Tensor:
    """A tensor, gathered where each rank holds a part of it, which all of them must then ask for."""
    gather = getattr(value, "full_tensor", None)  # looked up so, since importing DTensor takes a second
    return value if gather is None else cast(Tensor, gather())


def spread_like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, the same on all ranks, as `target` lies: this rank's part of it where that is spread."""
    if getattr(target, "full_tensor", None) is None or not value.ndim:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(target, DTensor)
    moved = value.to(target.device)
    return distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None)


def apply_tensors(model: Learner, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The reverse of `model_tensors`. What a state holds of heads and moments that no longer learn is left behind.

    A head that it does not hold keeps its first weights: in stage 0 its block was frozen in place, and it is back in an
    arm that freezes nothing, or all heads begin anew. An average of the encoder goes by the encoder where it is not
    held, or where the encoder no longer learns.
    """

    def found(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    for part, module in model.parts.items():
        held, wanted = found(f"{part}/"), module.state_dict()
        known = {name.partition(".")[0] for name in held}
        absent = {name for name in wanted if part == "decoder" and name.partition(".")[0] not in known}
        fresh = {name: wanted[name] for name in absent}
        known_now = {name: spread_like(value, wanted[name]) for name, value in held.items() if name in wanted}
        rest = found("encoder/") if part == "teacher" else fresh
        module.load_state_dict(rest | known_now)
    learning = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    scalars: dict[torch.nn.Parameter, tuple[float, ...]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in learning and (moments := found(f"optim/{name}/")):
            if "scalars" in moments:
                scalars[parameter] = tuple(moments.pop("scalars").tolist())
            if moments:
                optimizer.state[parameter] = {
                    moment: spread_like(value.to(parameter.device, copy=True), parameter)
                    for moment, value in moments.items()
                }
    if isinstance(optimizer, ScheduleFree):
        optimizer.take_up(scalars)


def without_heads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state without its heads and their moments, so that a model which it is applied to keeps its own, new ones."""
    return {name: value for name, value in tensors.items() if not name.startswith(("decoder/", "optim/heads."))}


def state_digest(told: str, tensors: dict[str, Tensor]) -> str:
    """Of all that training starts from, `told` and tensors: by it ranks find out whether they start alike, and a state
    whether it still is what was saved. BLAKE3, a sixth of the time that `save` takes."""
    found = Checksum()
    found.update(told.encode())
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return str(found)


def save_state(path: Path, inputs: str, progress: Progress, tensors: dict[str, Tensor]) -> None:
    """Write the whole state at once or not at all. `inputs` is the digest of what the run was asked to do."""
    header = {"version": str(STATE_VERSION), "inputs": inputs, "progress": progress.to_json()}
    header["digest"] = state_digest(header["inputs"] + header["progress"], tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, save(tensors, metadata=header))


def read_state(path: Path) -> tuple[str, Progress, dict[str, Tensor]]:
    """(inputs digest, progress, tensors). Raises CheckpointError when the file is damaged or of another version."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is no readable state ({error}); delete it to train this stage anew") from error
    if header.get("version") != str(STATE_VERSION):
        raise CheckpointError(
            f"{path} has state version {header.get('version')}, this program writes {STATE_VERSION}; "
            "delete it to train this stage anew"
        )
    digest = header.get("digest")  # of the header's own text, to which a later version may add when it is read
    if digest and digest != state_digest(header["inputs"] + header["progress"], tensors):  # earlier states have none
        raise CheckpointError(f"{path} was altered since it was saved; delete it to train this stage anew")
    return header["inputs"], Progress.from_json(header["progress"]), tensors
