"""Every setting of a run in one frozen value: the settings of models, cache and stages, read strictly from a recipe or
TOML file and from `key=value` overrides, checked, completed for this machine, and written back. Nothing here touches
data; torch is imported only to find out what this machine can do."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import tyro

from cache.config import CacheConfig
from models.config import SIZES, DecoderConfig, MaskConfig, ModelConfig, TargetConfig
from stages.config import DataConfig, EvalConfig, ScheduleConfig, TrainConfig


class ConfigError(ValueError):
    """A setting, recipe, file or flag is wrong; the message is one line for the user."""


@dataclass(frozen=True)
class ClusterConfig:
    """Where the tasks that build caches run."""

    address: str = ""
    """Dask scheduler to connect to; empty starts a local cluster."""
    workers: int = 0
    """Worker processes of the local cluster; 0 keeps one worker inside this process."""
    threads: int = 0
    """Torch threads of one worker; 0 shares this machine's cores among the workers."""


@dataclass(frozen=True)
class PipelineConfig:
    """Every setting of a run."""

    seed: int = 0
    """Weights, views, masks and the order of images are pure functions of this number."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)


Settings = Annotated[PipelineConfig, tyro.conf.FlagConversionOff]
"""PipelineConfig for tyro; switches are written `--schedule.scale_lr False`, much as in a TOML file."""

# --- reading ----------------------------------------------------------------------------------------------------------


def load_config(
    config: str, overrides: Sequence[str] = (), data: str = "", val: str = ""
) -> tuple[str, PipelineConfig]:
    """The name of a run and its checked settings.

    config: a recipe's name or a TOML file; a file may leave settings out, which then have their defaults.
    overrides: `key=value` in order, the later one wins; data, val: short for data.source and data.val_source.
    Raises ConfigError.
    """
    name, settings = read_config(config, overrides, data, val)
    check(settings)
    return name, settings


def read_config(
    config: str, overrides: Sequence[str] = (), data: str = "", val: str = ""
) -> tuple[str, PipelineConfig]:
    """load_config before the check: flags of the command line may still come."""
    from pipeline.recipes import recipe

    path = Path(config)
    if path.suffix == ".toml" or os.sep in config:
        # A run's own config.toml is named after its run, so that running from it goes on with that run.
        name = path.absolute().parent.name if path.stem == "config" else path.stem
        base = read_toml(path)
    else:
        name, base = config, recipe(config)
    values: dict[str, Any] = {}
    for override in overrides:
        values |= dict([parse_override(override)])
    values |= {key: value for key, value in (("data.source", data), ("data.val_source", val)) if value}
    return name, parse(values, base)


def read_toml(path: Path) -> PipelineConfig:
    """The settings in a TOML file over the defaults. Raises ConfigError naming the file."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}; give a recipe's name or an existing .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is no TOML file ({error}); correct it") from None
    try:
        return parse(dict(flatten(table)), PipelineConfig())
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def to_toml(config: PipelineConfig) -> str:
    """Every setting as TOML text, from which read_toml makes the same value again."""
    text = tomli_w.dumps(dataclasses.asdict(config))
    # tomli_w gives every number of a list a line of its own; text never holds a bare newline, so only lists match.
    text = re.sub(r"\[\n([^\]]*)\]", lambda found: f"[{', '.join(found[1].replace(',', ' ').split())}]", text)
    return "# Every setting of this run; `--config <this file>` gives the same run.\n" + text


def parse_override(text: str) -> tuple[str, Any]:
    """`key=value` as (key, value); lists and quoted text are TOML, anything else is passed on as it stands."""
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not key=value; write for example train.lr=1e-3")
    if value[:1] in ("[", '"', "'"):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return key, tomllib.loads(f"value = {value}")["value"]
    return key, value


def parse(values: Mapping[str, Any], base: PipelineConfig) -> PipelineConfig:
    """base with the dotted settings of values in it, converted and checked by tyro. Raises ConfigError."""
    known = dict(flatten(dataclasses.asdict(base)))
    args: list[str] = []
    for key, value in values.items():
        if key not in known:
            raise unknown_setting(key, known)
        if isinstance(known[key], tuple):
            args += [f"--{key}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
        elif isinstance(known[key], bool):
            args.append(f"--{key}={str(value).capitalize()}")
        elif isinstance(value, str | int | float):
            args.append(f"--{key}={value}")
        else:
            raise ConfigError(f"{key} = {value} is not one value; give a number, text, true or false")
    return run_tyro(Settings, args, base) if args else base


def run_tyro(kind: Any, args: Sequence[str], default: Any = tyro.MISSING_NONPROP, **options: Any) -> Any:
    """tyro.cli, whose boxes of many lines become one ConfigError. The only call of the parser in this project."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(kind, args=args, default=default, use_underscores=True, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    message = _first_block(shown.getvalue())
    unknown = message.partition("Unrecognized options: --")[2]
    if unknown:
        raise unknown_setting(re.split("[,= ]", unknown)[0], dict(flatten(dataclasses.asdict(PipelineConfig()))))
    message = message.removeprefix("Error parsing --").rstrip(".")
    raise ConfigError(f"{message}; `--help` lists every setting")


def _first_block(box: str) -> str:
    """What tyro's box says above its first rule, as one line. Where stdout is not UTF-8 it draws a title and no box."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip("│ ") for line in plain.splitlines() if line[:1] not in ("╭", "╰")]
    blocks = re.split(r"\n[─-]{8,}", "\n".join(lines))
    return " ".join(blocks[0 if "│" in plain else 1].split())


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def unknown_setting(key: str, known: Mapping[str, Any]) -> ConfigError:
    """Suggests the same last word in another section, else the most similar name."""
    leaf = key.rpartition(".")[2]
    near = [name for name in known if name.rpartition(".")[2] == leaf] or difflib.get_close_matches(key, known, n=1)
    return ConfigError(f"no setting {key}; " + (f"did you mean {near[0]}?" if near else "`--help` lists every setting"))


# --- checking ---------------------------------------------------------------------------------------------------------

BOUNDS = {
    "seed": "[0, inf)",
    "data.limit": "[0, inf)",
    "data.flip": "[0, 1]",
    "model.image_size": "[1, inf)",
    "model.patch_size": "[1, inf)",
    "model.width": "[0, inf)",
    "model.depth": "[0, inf)",
    "model.heads": "[0, inf)",
    "mask.ratio": "(0, 1)",
    "decoder.depth": "[1, inf)",
    "decoder.width": "[0, inf)",
    "decoder.heads": "[0, inf)",
    "schedule.t0": "(0, 1]",
    "cache.views": "[1, inf)",
    "cache.shard_rows": "[1, inf)",
    "cache.encode_batch": "[1, inf)",
    "train.batch_size": "[1, inf)",
    "train.accumulate": "[1, inf)",
    "train.max_steps": "[0, inf)",
    "train.lr": "(0, inf)",
    "train.min_lr": "[0, inf)",
    "train.warmup_epochs": "[0, inf)",
    "train.weight_decay": "[0, inf)",
    "train.beta2": "[0, 1)",
    "train.clip": "[0, inf)",
    "train.threads": "[0, inf)",
    "train.loader_threads": "[1, inf)",
    "train.prefetch": "[1, inf)",
    "train.save_every": "(0, inf)",
    "eval.every": "[0, inf)",
    "eval.train_limit": "[0, inf)",
    "eval.val_limit": "[0, inf)",
    "eval.knn_k": "[1, inf)",
    "eval.batch_size": "[1, inf)",
    "cluster.workers": "[0, inf)",
    "cluster.threads": "[0, inf)",
}
"""The interval in which a single number makes sense."""

NOT_BUILT = {
    ("target.kind", "hog"): "use pixels or features",
    ("schedule.kind", "adaptive"): "use explicit or freezeout",
    ("cache.backend", "webdataset"): "use zarr",
    ("cache.codec", "bfloat16"): "use float16",
    ("cache.codec", "int8"): "use float16",
}


def check(config: PipelineConfig) -> None:
    """Refuses what makes no sense or is not built yet. Raises ConfigError with value, bound and remedy."""
    for key, bound in BOUNDS.items():
        if not _inside(value := get(config, key), bound):
            raise ConfigError(f"{key} = {value} is outside {bound}; choose a value inside")
    for (key, value), remedy in NOT_BUILT.items():
        if get(config, key) == value:
            raise ConfigError(f"{key} = {value} is not built yet in this version; {remedy}")
    if config.model.weights:
        raise ConfigError(f"model.weights = {config.model.weights} is not built yet in this version; leave it empty")
    for problem in (*_model_problems(config), *_data_problems(config), *_schedule_problems(config.schedule)):
        raise ConfigError(problem)


def get(config: PipelineConfig, key: str) -> Any:
    """The value of a dotted setting."""
    return reduce(getattr, key.split("."), config)


def _inside(value: float, bound: str) -> bool:
    low, high = (float(end) for end in bound[1:-1].split(","))
    return (low <= value if bound[0] == "[" else low < value) and (value <= high if bound[-1] == "]" else value < high)


def _model_problems(config: PipelineConfig) -> Iterator[str]:
    model, mask, decoder = config.model, config.mask, config.decoder
    if model.image_size % model.patch_size:
        yield (
            f"model.patch_size = {model.patch_size} does not divide model.image_size = {model.image_size}; "
            f"try model.image_size={max(1, model.image_size // model.patch_size) * model.patch_size}"
        )
    tokens, keep = model.num_tokens, int(model.num_tokens * (1 - mask.ratio))
    if tokens % mask.groups:
        yield f"mask.groups = {mask.groups} does not divide the {tokens} tokens of an image; use mask.groups=1"
    if not keep:
        yield f"mask.ratio = {mask.ratio} leaves none of the {tokens} tokens visible; lower mask.ratio"
    if keep > tokens // mask.groups:
        yield (
            f"mask.ratio = {mask.ratio} keeps {keep} of {tokens} tokens, but a group of mask.groups = {mask.groups} "
            f"has only {tokens // mask.groups}; raise mask.ratio or lower mask.groups"
        )
    encoder_width = model.width or SIZES.get(model.name, (0,))[0]
    decoder_sizes = decoder.sizes(encoder_width) if encoder_width else (decoder.width, decoder.heads)
    for name, width, heads in (("model", model.width, model.heads), ("decoder", *decoder_sizes)):
        if width % 4:
            yield f"{name}.width = {width} is not divisible by 4, which the sin-cos positions need; change {name}.width"
        if width and heads and width % heads:
            yield f"{name}.width = {width} is not divisible by {name}.heads = {heads}; change either"


def _data_problems(config: PipelineConfig) -> Iterator[str]:
    data, train = config.data, config.train
    for key, (low, high), top in (("scale", data.crop_scale, 1.0), ("ratio", data.crop_ratio, float("inf"))):
        if not 0 < low <= high <= top:
            yield f"data.crop_{key} = [{low}, {high}] is not 0 < smallest <= largest <= {top}; reorder or lower it"
    if not data.source:
        yield "data.source is empty; give sample, a folder, tars or a torchvision name"
    if train.batch_size % train.accumulate:
        parts = f"train.accumulate = {train.accumulate}"
        yield f"train.batch_size = {train.batch_size} is not divisible by {parts}; change either"
    if train.min_lr > train.lr:
        yield f"train.min_lr = {train.min_lr} is above train.lr = {train.lr}; lower train.min_lr"
    kind, _, index = train.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        yield f"train.device = {train.device} is none of auto, cpu, cuda, cuda:<n>; choose one of them"


def _schedule_problems(schedule: ScheduleConfig) -> Iterator[str]:
    cuts, epochs = list(schedule.cuts), list(schedule.epochs)
    if cuts[:1] != [0] or sorted(set(cuts)) != cuts:
        yield f"schedule.cuts = {cuts} does not start at 0 and rise; write for example schedule.cuts=[0,3,6,9]"
    if not epochs or min(epochs) < 1:
        yield f"schedule.epochs = {epochs} has a stage of less than 1 epoch; raise it or drop the stage"
    if schedule.kind == "explicit" and len(cuts) != len(epochs):
        yield f"schedule.cuts = {cuts} and schedule.epochs = {epochs} differ in length; give every cut its epochs"


# --- completing -------------------------------------------------------------------------------------------------------


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
        train = dataclasses.replace(train, threads=_cores())
    if detect and "auto" in (train.device, train.precision):
        device = _device() if train.device == "auto" else train.device
        precision = _precision(device) if train.precision == "auto" else train.precision
        train = dataclasses.replace(train, device=device, precision=precision)
    return dataclasses.replace(config, train=train)


def _cores() -> int:
    """The cores that this process may use; a container often gives it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
