"""A device profile: how fast a machine computes, reads, rounds and writes, as one frozen value. `plan` measures one
here, or is given one of a machine that is not here, as a file or by the name of one that ships in
`pipeline/profiles`. Stands between measuring (`gauge`) and predicting (`predict`), which knows machines only by it.
Free of torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w

from cache.codecs import CODECS
from pipeline.config import ConfigError

SHIPPED = Path(__file__).parent / "profiles"
TERA = 1e12
ENDLESS = 1e18
"""Bytes that stand for the room of a store, which has no end; JSON has no infinity."""


@dataclass(frozen=True)
class BlockRate:
    """How fast transformer blocks of a width run over so many tokens an image, in useful TFLOP/s: the FLOPs that
    `stages.flops` counts over the seconds that they take."""

    width: int
    tokens: int
    frozen: float
    """Forward without gradient, as caches are built and as blocks in place run."""
    learning: float
    """Forward and backward together, which count as three forwards."""


@dataclass(frozen=True)
class CodecRate:
    """How fast one thread stores and reads features, in 10^9 values a second."""

    codec: str
    round: float
    """Rounding, and measuring what is lost."""
    restore: float
    """Back to float32, checksums compared; the bytes come from disk besides."""


@dataclass(frozen=True)
class DeviceProfile:
    """A machine. Rates are of one device and its host; times in seconds."""

    name: str
    device: str
    """The device in words."""
    origin: Literal["measured", "assumed"]
    assumptions: tuple[str, ...]
    """What was taken for granted, a sentence each: peaks, utilisation, storage, price and where they come from."""
    blocks: tuple[BlockRate, ...]
    """The entry nearest in width and tokens speaks for a block."""
    codecs: tuple[CodecRate, ...]
    embed_tflops: float
    """Forward of the patch embedding."""
    optimizer_rate: float
    """Parameters that the optimiser updates in a second."""
    step_seconds: float
    """What a training step takes whatever its size: launches, masks, the loss."""
    crop_seconds: float
    """Reading, hashing and decoding an image and cutting one view of it, in one thread."""
    write_rate: float
    """Bytes a second that one thread checksums, hashes and writes to the disk of the caches."""
    read_rate: float
    """Bytes a second that one thread copies of what has come from it; restoring is counted besides."""
    disk_rate: float
    """Bytes a second that the disk gives to all threads together, rows of a shuffled epoch."""
    start_seconds: float
    """What building a cache takes besides its shards: starting the workers, the model, the manifest."""
    compile_seconds: float
    """Start-up of torch.compile for each learning block."""
    compile_gain: float
    """Time of a compiled step over that of an eager one."""
    cores: int
    """Cores of the host."""
    busy_cores: int
    """Cores that blocks keep busy while they run: torch's threads on a CPU, 0 beside a GPU."""
    memory_gb: float
    """Memory of the device, in 10^9 bytes."""
    disk_gb: float
    """Disk for caches, in 10^9 bytes; of one measured here what is free where they lie, and what the run's have of it
    already."""
    price_per_hour: float = 0.0
    """0: unknown, and nothing is said of money."""
    currency: str = "USD"

    def rate(self, width: int, tokens: int) -> BlockRate:
        """The entry that speaks for blocks of a size: nearest in the logarithms of width and tokens."""

        def distance(one: BlockRate) -> float:
            return abs(math.log(one.width / width)) + abs(math.log(one.tokens / tokens))

        return min(self.blocks, key=distance)

    def codec(self, name: str) -> CodecRate:
        """The rates of a codec."""
        return next(one for one in self.codecs if one.codec == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which `from_dict` makes the same profile."""
        found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return found

    @classmethod
    def from_dict(cls, values: Any, where: str = "the profile") -> DeviceProfile:
        """Raises ConfigError naming what is missing, unknown or out of bounds."""
        plain = _fields(cls, values, where)
        plain["assumptions"] = tuple(_texts(plain["assumptions"], f"{where}: assumptions"))
        for key, kind in (("blocks", BlockRate), ("codecs", CodecRate)):
            rows = plain[key]
            if not isinstance(rows, list) or not rows:
                raise ConfigError(f"{where}: {key} is no list of tables; write [[{key}]] once or more often")
            plain[key] = tuple(kind(**_fields(kind, row, f"{where}: {key}")) for row in rows)
        found = cls(**plain)
        if missing := [codec for codec in CODECS if codec not in [one.codec for one in found.codecs]]:
            raise ConfigError(f"{where}: codecs lacks {missing[0]}; give the rates of {', '.join(CODECS)}")
        if not found.assumptions:
            raise ConfigError(f"{where}: assumptions is empty; say in a sentence or more where the numbers come from")
        return found


MAY_BE_ZERO = {"step_seconds", "start_seconds", "compile_seconds", "busy_cores", "price_per_hour"}


def _fields(kind: Any, values: Any, where: str) -> dict[str, Any]:
    """The values of a dataclass' fields, checked one by one."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is no table; see the profiles in {SHIPPED.parent.name}/{SHIPPED.name}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            raise ConfigError(f"{where}: no field {key}; " + (f"did you mean {near[0]}?" if near else "drop it"))
    found = {}
    for name, field in fields.items():
        if name not in values:
            if field.default is dataclasses.MISSING:
                raise ConfigError(f"{where}: {name} is missing; add it")
            continue
        found[name] = _value(name, str(field.type), values[name], where)
    return found


def _value(name: str, kind: str, value: Any, where: str) -> Any:
    if kind == "str" and not isinstance(value, str):
        raise ConfigError(f"{where}: {name} = {value} is no text; put it in quotes")
    if kind.startswith("Literal") and value not in ORIGINS:
        raise ConfigError(f"{where}: {name} = {value} is unknown; use {' or '.join(ORIGINS)}")
    if kind in ("int", "float"):
        if isinstance(value, bool) or not isinstance(value, int if kind == "int" else int | float):
            number = "whole number" if kind == "int" else "number"
            raise ConfigError(f"{where}: {name} = {value!r} is no {number}; correct it")
        if not math.isfinite(value) or value < 0 or (value == 0 and name not in MAY_BE_ZERO):
            least = "at least 0" if name in MAY_BE_ZERO else "above 0"
            raise ConfigError(f"{where}: {name} = {value} must be {least}; correct it")
        return float(value) if kind == "float" else value
    return value


ORIGINS = get_args(Literal["measured", "assumed"])


def _texts(values: Any, where: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(text, str) and text.strip() for text in values):
        raise ConfigError(f"{where} is no list of sentences; write one text for each")
    return values


def shipped() -> list[str]:
    """The names of the profiles that ship, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.toml"))


def read_profile(name: str) -> DeviceProfile:
    """A profile that ships, by name, or a TOML or JSON file of one; a plan.json counts, which holds the profile that it
    was made with. Raises ConfigError."""
    path = SHIPPED / f"{name}.toml" if name in shipped() else Path(name)
    if path.suffix not in (".toml", ".json"):
        near = difflib.get_close_matches(name, shipped(), n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(shipped())}, or give a .toml file"
        raise ConfigError(f"no device profile {name}; {hint}")
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"no device profile {name}: there is no such file; choose {', '.join(shipped())}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} is no {path.suffix[1:].upper()} file ({error}); correct it") from None
    if path.suffix == ".json" and isinstance(values, dict) and "profile" in values:
        values = values["profile"]
    return DeviceProfile.from_dict(values, str(name))


def to_toml(profile: DeviceProfile) -> str:
    """The profile as TOML text, from which `read_profile` makes the same value again."""
    return tomli_w.dumps(profile.to_dict())
