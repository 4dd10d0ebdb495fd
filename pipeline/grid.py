"""The request of `permafrost study`: its flags, and the grid of variants and seeds as ordinary runs, checked before any
of them begins. Free of torch but for what resolving a machine asks."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.checks import check
from pipeline.config import ConfigError, PipelineConfig
from pipeline.layout import RunPaths, run_paths
from pipeline.machine import resolve
from pipeline.reading import parse, parse_override, read_config, read_toml, run_tyro
from pipeline.studies import Measured, Study, hint, study

Text = Annotated[str, tyro.conf.arg(metavar="TEXT")]


@dataclass(frozen=True)
class StudyFlags:
    """A grid of overrides and seeds as one table and one figure. Without a name the studies are listed."""

    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]")] = ""
    """The study; empty lists them."""
    config: Text = ""
    """A recipe or a TOML file in place of the study's own recipe; what the study sets goes over it."""
    data: Text = ""
    """Short for data.source."""
    data_val: Text = ""
    """Short for data.val_source; refused by studies that choose settings."""
    run: Text = ""
    """Folder of all studies; empty means runs/studies."""
    set: Annotated[tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Settings of all runs, over the study's; those that tell its variants apart are refused."""
    cache_root: Text = ""
    """Folder of the caches; empty means caches in the folder of all studies."""
    seeds: tuple[int, ...] = ()
    """Seeds in place of the study's."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="VARIANT ...")] = ()
    """Run only these variants, in the study's order; the table says which are left out. Empty runs all."""
    hours: float = 0.0
    """Stop after so many hours, in the middle of a run if need be; the same command goes on. 0: no limit."""
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Only tell the runs of the study and how they stand."""
    debug: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Add the traceback to an error."""
    yes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Taken for the sake of other verbs; a study removes nothing that was not its own."""


@dataclass(frozen=True)
class Run:
    """One ordinary run of the grid: settings and a seed, and what variants measure of it."""

    name: str
    """That of the first variant that has these settings."""
    seed: int
    config: PipelineConfig
    paths: RunPaths
    measures: dict[str, Measured]
    """What is measured, by variant."""

    @property
    def label(self) -> str:
        return f"{self.name}, seed {self.seed}"


@dataclass(frozen=True)
class Request:
    """A call of the verb, read and checked."""

    flags: StudyFlags
    study: Study | None = None
    runs: tuple[Run, ...] = ()
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def asked(self) -> tuple[Run, ...]:
        """The runs of this call, each with what `--only` leaves to be measured of it."""
        only = self.flags.only
        runs = (replace(run, measures={k: v for k, v in run.measures.items() if k in only}) for run in self.runs)
        return tuple(run for run in runs if run.measures) if only else self.runs

    @property
    def root(self) -> Path:
        """The folder of all studies."""
        return studies_root(self.flags)

    @property
    def folder(self) -> Path:
        """The folder of this study: its runs, its table, its figure."""
        return self.root / self.flags.name

    @property
    def pool(self) -> Path:
        return self.root / "parts"


def read_study(args: Sequence[str]) -> Request:
    """The request that the words after `study` make. Raises ConfigError; prints and exits for --help."""
    flags = run_tyro(StudyFlags, list(args), prog="permafrost study", default=StudyFlags())
    if not flags.name:
        return Request(flags)
    if flags.hours < 0:
        raise ConfigError(f"--hours = {flags.hours:g} is outside [0, inf); leave it out for no limit")
    asked = study(flags.name)
    if flags.seeds:
        asked = replace(asked, seeds=tuple(dict.fromkeys(flags.seeds)))
    for name in flags.only:
        if name not in asked.variants:
            raise ConfigError(f"study {flags.name} has no variant {name}; {hint(name, asked.variants)}")
    return Request(flags, asked, tuple(grid(flags, asked)))


def grid(flags: StudyFlags, asked: Study) -> Iterator[Run]:
    """The runs, seed by seed, so that the first seed's comparison is whole before the next one begins.

    Variants that have the same settings are one run. Raises ConfigError naming the variant that makes no sense.
    """
    common = dict(parse_override(text) for texts in flags.set for text in texts)
    varied = {key for variant in asked.variants.values() for key in variant.settings} | {"seed", "cache.root"}
    if clash := sorted(common.keys() & varied):
        raise ConfigError(f"study {flags.name} sets {clash[0]} itself; leave it out of SET, or add a study of your own")
    root = studies_root(flags)
    settings = {**asked.settings, **common, "cache.root": flags.cache_root or str(root / "caches")}
    configs = {}
    for name, variant in asked.variants.items():
        _, base = read_config(flags.config or asked.recipe)
        values = settings | dict(variant.settings)
        values |= {"data.source": flags.data} if flags.data else {}
        values |= {"data.val_source": flags.data_val} if flags.data_val else {}
        try:
            configs[name] = parse(values, base)
            check(configs[name])
            told = asked.chooses and evaluation_images(flags, configs[name])
        except ConfigError as error:
            raise ConfigError(f"study {flags.name}, variant {name}: {error}") from None
        if told:
            raise ConfigError(f"study {flags.name} chooses settings, so it may not see {told} is held back")
    for seed in asked.seeds:
        found: dict[PipelineConfig, Run] = {}
        for name, config in configs.items():
            arm = asked.variants[name].arm
            if config in found:
                found[config].measures[name] = arm
                continue
            paths = run_paths(str(root / flags.name / f"{name}-seed-{seed}"), config.cache.root)
            paths = replace(paths, lists=root / "index")  # images are hashed once for all runs
            previous = read_toml(paths.config) if paths.config.exists() else None
            whole = resolve(replace(config, seed=seed), previous)
            if previous:
                refuse_other_scores(paths, previous, whole)
            found[config] = Run(name, seed, whole, paths, {name: arm})
        yield from found.values()


def evaluation_images(flags: StudyFlags, config: PipelineConfig) -> str:
    """The evaluation images that a run would be scored on, and what to do instead; empty where a tenth of the training
    images is held back."""
    data = config.data
    if data.val_source:
        name = "DATA_VAL" if flags.data_val else "data.val_source"
        return f"{name} = {data.val_source}; leave it out, a tenth of DATA"
    if data.has_own_val:
        return f"the evaluation images of data.source = {data.source}; name other images with DATA, a tenth of which"
    return ""


def refuse_other_scores(paths: RunPaths, had: PipelineConfig, wants: PipelineConfig) -> None:
    """Raise ConfigError where a run was scored otherwise than it would be now: no stage runs again for that, so that
    rows of one table would not compare."""
    scored = {"data.val_source": (had.data.val_source, wants.data.val_source)}
    scored |= {f"eval.{key}": (value, getattr(wants.eval, key)) for key, value in asdict(had.eval).items()}
    for key, (before, now) in scored.items():
        if before != now:
            raise ConfigError(
                f"{paths.root} was scored with {key} = {before}, this call has {now}; leave that as it was, or take "
                "another folder with RUN="
            )


def studies_root(flags: StudyFlags) -> Path:
    return Path(flags.run or "runs/studies")
