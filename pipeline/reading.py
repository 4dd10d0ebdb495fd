"""Settings read strictly, from a recipe or a TOML file and from `key=value` overrides, and written back. tyro parses
all of them, flags included; its boxes of many lines become one."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import tyro

from pipeline.checks import check
from pipeline.config import ConfigError, PipelineConfig
from pipeline.recipes import recipe

Settings = Annotated[PipelineConfig, tyro.conf.FlagConversionOff]
"""PipelineConfig for tyro; switches are written `--schedule.scale_lr False`, much as in a TOML file."""


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
    base = read_toml(Path(config)) if is_file(config) else recipe(config)
    values: dict[str, Any] = {}
    for override in overrides:
        values |= dict([parse_override(override)])
    values |= {key: value for key, value in (("data.source", data), ("data.val_source", val)) if value}
    return run_name(config), parse(values, base)


def is_file(config: str) -> bool:
    """Whether settings are asked for as a TOML file, not as a recipe's name."""
    return Path(config).suffix == ".toml" or os.sep in config


def run_name(config: str) -> str:
    """The name of a run that starts from a recipe or a TOML file. A run's own config.toml is named after its run, so
    that running from it goes on with that run."""
    path = Path(config)
    if not is_file(config):
        return config
    return path.absolute().parent.name if path.stem == "config" else path.stem


def run_folder(config: str) -> str:
    """Where the run of a recipe or a TOML file lies if nobody says where: in runs/<name>; that of a run's own
    config.toml, wherever it may be, in the folder of that file."""
    folder = Path(config).parent
    own = is_file(config) and Path(config).stem == "config" and (folder / "events.jsonl").exists()
    return str(folder) if own else f"runs/{run_name(config)}"


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
    """`key=value` as (key, value); lists and quoted text are TOML, anything else is passed on as it stands.

    Words of a list need no quotes, which shells would take away: `heads.targets=[hog,pixels]`.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise ConfigError(f"override {text!r} is not key=value; write for example train.lr=1e-3")
    if value[:1] in ("[", '"', "'"):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return key, tomllib.loads(f"value = {value}")["value"]
    if re.fullmatch(r"\[[\w, -]*\]", value):
        return key, [word.strip() for word in value[1:-1].split(",") if word.strip()]
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
