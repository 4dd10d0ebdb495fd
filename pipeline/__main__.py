"""The command line: `permafrost VERB`, which is `python -m pipeline VERB`. Reads the request, completes the settings,
hands one Job to the verb's function, and turns what happens into an exit status. What a verb needs is imported when it
is called, so that `status` and `explain` answer in a moment."""

from __future__ import annotations

import contextlib
import difflib
import faulthandler
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any

import tyro

from cache.patience import use_store
from cache.place import without_secrets
from cache.rank import ALONE, Rank
from pipeline import __version__
from pipeline.checks import check
from pipeline.config import ConfigError
from pipeline.job import Interrupted, Job, RunFailed
from pipeline.layout import run_paths
from pipeline.machine import resolve, wait_briefly
from pipeline.ranks import TRAINING, rank_here
from pipeline.reading import Settings, parse, read_config, read_toml, run_folder, run_tyro

DONE, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
WRONG_PATH = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
ROOMS = ("pipeline", "stages", "cache", "models")


@dataclass(frozen=True)
class Verb:
    """A verb of the command line."""

    function: str
    """`module:function`, called with the Job, or with what `reads` makes."""
    help: str
    target: str = ""
    """What follows the verb: `N` a stage's number, `ARM` e2e or freeze, brackets when it may be left out."""
    saves: bool = False
    """Whether Ctrl-C lets it save and stop by itself; otherwise it simply ends."""
    reads: str = ""
    """`module:function` that makes the request of the words after the verb, where it is not a Job."""
    plans: bool = False
    """Whether it takes the flags of plans for what is not here."""
    orders: bool = False
    """Whether it takes the flag for the order of training."""
    torch: bool = True
    """Whether it may take the seconds that asking torch about this machine costs."""


VERBS = {
    "all": Verb("pipeline.runner:run_all", "all stages, the arms, evaluation, a table, the report", saves=True),
    "stage": Verb("pipeline.runner:run_stage", "run stage N, and first what it needs", "N", saves=True),
    "cache": Verb("pipeline.runner:run_cache", "only build the cache that stage N reads", "N", saves=True),
    "plan": Verb("pipeline.costs:show_plan", "what would run: time, disk, break-even, against e2e", plans=True),
    "explain": Verb("pipeline.explain:show_explain", "of every stage: current, stale and why, or missing", torch=False),
    "status": Verb("pipeline.status:show_status", "where the run stands", torch=False),
    "arm": Verb("pipeline.runner:run_arm", "run a baseline arm: e2e or freeze", "ARM", saves=True),
    "speedup": Verb("pipeline.speedup:run_speedup", "the three arms side by side, written to speedup.json", saves=True),
    "probe": Verb("pipeline.runner:run_probe", "kNN and linear probes of a stage's or an arm's encoder", "[N|ARM]"),
    "verify": Verb("pipeline.care:run_verify", "hash every shard of every cache again", orders=True),
    "repair": Verb("pipeline.care:run_repair", "rebuild only the shards that are bad", saves=True),
    "equivalence": Verb("pipeline.equivalence:run_equivalence", "recompute samples live, compare them with the cache"),
    "gc": Verb("pipeline.care:run_gc", "remove caches that no current stage needs; asks first, --yes does not"),
    "export": Verb("pipeline.export:run_export", "an encoder as a folder that timm loads: <run>/export", "[N|ARM]"),
    "bench": Verb("pipeline.bench:run_bench", "the benchmarks; prints ratios"),
    "report": Verb("pipeline.report:run_report", "report.html with its figures, of what is there", torch=False),
    "finetune": Verb(
        "pipeline.runner:run_finetune", "supervised fine-tuning of a stage's or an arm's encoder", "[N|ARM]", saves=True
    ),
    "study": Verb(
        "pipeline.study:run_study",
        "a grid of overrides and seeds as one table; without a name, the list of studies",
        "[NAME]",
        saves=True,
        reads="pipeline.grid:read_study",
    ),
}

OWN = ("status", "speedup", "probe", "verify", "repair", "equivalence", "gc", "export", "bench", "report")
"""Verbs that work on a run as it lies, and so start from the run's own settings. What trains, and what foretells that,
starts from the recipe, so that a changed setting makes stale what it touches."""

RECIPE = "sample"
"""What settings start from where nothing else is given."""

ARMS = ("e2e", "freeze")
MANY = 10**6
"""Stages where only the data tell how many there are; the verb itself refuses what does not exist."""
Text = Annotated[str, tyro.conf.arg(metavar="TEXT")]


@dataclass(frozen=True)
class Flags:
    """Flags that every verb takes."""

    config: Text = ""
    """A recipe (sample, cifar10, vit_b16, localmim, original, adapt) or a TOML file; empty means sample. Verbs that
    work on a run as it lies start from its config.toml instead, unless both --config and --run are given."""
    data: Text = ""
    """Short for --data.source."""
    data_val: Text = ""
    """Short for --data.val_source."""
    run: Text = ""
    """Folder of the run; empty means runs/<recipe>."""
    set: Annotated[tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Overrides of settings; the later one wins."""
    cache_root: Text = ""
    """Short for --cache.root."""
    scheduler_address: Text = ""
    """Short for --cluster.address: a Dask scheduler that runs already."""
    scheduler_file: Text = ""
    """Short for --cluster.scheduler_file."""
    debug: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Add the traceback to an error."""
    yes: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Do not ask before anything is removed."""


@dataclass(frozen=True)
class PlanFlags(Flags):
    """Flags of `plan` besides."""

    images: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Plan for so many training images, which need not be here; 0 takes those of the data."""
    device_profile: Text = ""
    """Plan for another device: the name of a profile that ships (a100-80gb, h100-sxm, rtx4090, two-cores) or a TOML or
    JSON file of one; a plan.json holds that of the machine it was made on. Empty measures this machine."""


@dataclass(frozen=True)
class OrderFlags(Flags):
    """Flags of `verify` besides."""

    order: Annotated[str, tyro.conf.arg(metavar="EPOCH|all")] = ""
    """In place of the shards, compare what every finished stage and arm has read (views, rows, their order) with what
    the settings in its record ask for; of an epoch, counted from 0, print all rows."""


def flags_of(verb: Verb) -> type[Flags]:
    """The flags that a verb takes."""
    return PlanFlags if verb.plans else OrderFlags if verb.orders else Flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns 0 done, 1 the run failed, 2 the request is wrong, 130 interrupted."""
    faulthandler.enable(2)  # a mapped file that is cut short while it is read ends the process: say where
    wait_briefly()
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _call(args)
    except SystemExit as stop:  # tyro has printed its help
        return int(stop.code or DONE)
    except KeyboardInterrupt as error:
        text = "interrupted; what was saved is kept, the same command goes on from there"
        return _end(args, error, INTERRUPTED, text)
    except Interrupted as error:
        return _end(args, error, INTERRUPTED, str(error))
    except Exception as error:
        return _end(args, error, exit_status(error), str(error))


def _call(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(overview())
        return DONE
    if args[0] == "--version":
        print(f"permafrost {__version__}")
        return DONE
    name, rest = args[0], args[1:]
    if name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        hint = f"did you mean {near[0]}?" if near else "`permafrost --help` lists the verbs"
        raise ConfigError(f"no verb {name}; {hint}")
    verb = VERBS[name]
    request = named(verb.reads)(rest) if verb.reads else read_job(name, rest)
    rank = rank_here()
    if rank.rank and name not in TRAINING:
        return DONE  # the first rank does it
    with stop_on_signal(request.stop, rank) if verb.saves else contextlib.nullcontext():
        function = named(verb.function)
        if rank.ranks > 1 and name in TRAINING:
            from pipeline.crew import work_together

            return work_together(request, name, function, rank)
        function(request)
    return DONE


def named(function: str) -> Any:
    """The function that `module:function` names."""
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def overview() -> str:
    """The verbs with a line of help each."""
    lines = [f"  {name + ' ' + verb.target:18} {verb.help}" for name, verb in VERBS.items()]
    return "\n".join(
        (
            "usage: permafrost VERB [--config RECIPE|FILE.toml] [--data SOURCE] [--run FOLDER] [--set KEY=VALUE ...]",
            "",
            *lines,
            "",
            f"{', '.join(OWN)} start from",
            "the settings of the run that they work on, <run>/config.toml, unless both --config and --run are given.",
            "`permafrost VERB --help` lists every flag and setting with its default.",
            "torchrun --nproc-per-node N -m -- pipeline VERB trains on N ranks; see docs/DISTRIBUTED.md.",
        )
    )


# --- the request ------------------------------------------------------------------------------------------------------


def read_job(name: str, args: list[str]) -> Job:
    """The job that the arguments after a verb ask for. Raises ConfigError; prints and exits for --help."""
    verb = VERBS[name]
    flags, rest = run_tyro(flags_of(verb), args, return_unknown_args=True, add_help=False)
    overrides = [text for texts in flags.set for text in texts]
    own = own_settings(name, flags)
    recipe, config = read_config(own or flags.config or RECIPE, overrides, flags.data, flags.data_val)
    short = {
        "cache.root": flags.cache_root,
        "cluster.address": flags.scheduler_address,
        "cluster.scheduler_file": flags.scheduler_file,
    }
    config = parse({key: value for key, value in short.items() if value}, config)
    words = rest
    if any(word.startswith("-") for word in rest):  # settings as flags: only now is it worth the time to list them all
        if {"-h", "--help"} & set(rest):
            args = ["--help"]  # tyro leaves out of its help what it has already read
        request = run_tyro(request_type(verb), args, prog=f"permafrost {name}", default=request_type(verb)(config))
        words, config = list(request.target), request.settings
    check(config)
    use_store(config.store)
    paths = run_paths(flags.run or run_folder(flags.config or RECIPE), config.cache.root)
    previous = read_toml(paths.config) if paths.config.exists() and not own else None
    config = resolve(config, previous, detect=verb.torch)
    stages = MANY if config.schedule.caches == "cost" else len(config.schedule.cuts)
    target = read_target(name, verb.target, words, stages)
    more = {"images": flags.images, "device_profile": flags.device_profile} if verb.plans else {}
    more |= {"order": flags.order} if verb.orders else {}
    if verb.plans and flags.images < 0:
        raise ConfigError(f"--images {flags.images} must be at least 1; leave it out to take the images of the data")
    return Job(recipe, config, paths, yes=flags.yes, target=target, **more)


def own_settings(name: str, flags: Flags) -> str:
    """The config.toml of the run that a verb works on as it lies; empty where there is none, and where settings are
    given beside a run. A config without a run says which run."""
    if name not in OWN or (flags.config and flags.run):
        return ""
    file = run_paths(flags.run or run_folder(flags.config or RECIPE), "").config
    return str(file) if file.exists() else ""


def request_type(verb: Verb) -> type[Any]:
    """What tyro reads for a verb: its flags, and every setting as a flag with its help and default."""
    target = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar=verb.target, help="")]
    flags = flags_of(verb)
    return make_dataclass(
        "Request",
        [
            ("settings", Annotated[Settings, tyro.conf.arg(name="")]),
            ("flags", Annotated[flags, tyro.conf.arg(name="")], field(default_factory=flags)),
            ("target", target if verb.target else tyro.conf.Suppress[tuple[str, ...]], ()),
        ],
        namespace={"__doc__": verb.help},
        frozen=True,
    )


def read_target(name: str, wanted: str, words: list[str], stages: int) -> str | int | None:
    """The word after the verb, as a stage's number or an arm's name. Raises ConfigError."""
    usage = f"write `permafrost {name} {wanted}`".strip()
    if len(words) > bool(wanted):
        raise ConfigError(f"{name} does not know what to do with {words[-1]!r}; {usage}")
    if not words:
        if wanted and wanted[0] != "[":
            raise ConfigError(f"{name} needs {wanted}; {usage}")
        return None
    (word,) = words
    first = 1 if name == "cache" else 0  # stage 0 reads images
    if "N" in wanted.strip("[]").split("|") and word.isdigit():
        if not first <= int(word) < stages:
            raise ConfigError(f"{name} {word} is outside {first}..{stages - 1}, the stages of schedule.cuts; pick one")
        return int(word)
    if "ARM" in wanted and word in ARMS:
        return word
    raise ConfigError(f"{name} does not know {word!r}; N is a stage's number, ARM one of {', '.join(ARMS)}; {usage}")


# --- how it ends ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stop_on_signal(stop: threading.Event, rank: Rank = ALONE) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets stop, so that the work can save; the next one interrupts it where it is.

    Of several ranks none may leave the others: they stop together, and torchrun ends those that take longer than 30 s.
    """

    def handle(*_: Any) -> None:
        if stop.is_set() and rank.ranks == 1:
            raise KeyboardInterrupt
        told = stop.is_set() or rank.rank > 0
        stop.set()
        if not told:  # print may not be re-entered
            more = "" if rank.ranks > 1 else "; once more stops at once"
            os.write(2, f"stopping: the state is being saved{more}\n".encode())

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        # A rank that is about to say why it ends is sent SIGTERM by torchrun, because another has ended already.
        for number, handler in before.items() if rank.ranks == 1 else ():
            signal.signal(number, handler)


def exit_status(error: Exception) -> int | None:
    """Whose fault an error is: 2 the request's, 1 the run's, None ours, which earns a traceback.

    A ValueError is the user's when a line of this project raised it; one from inside a library is a bug let through.
    """
    if isinstance(error, WRONG_PATH):
        return WRONG
    if isinstance(error, RunFailed | OSError):
        return FAILED
    if isinstance(error, ValueError):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        room = str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] if frames else ""
        if room in (*ROOMS, "__main__") or type(error).__module__.partition(".")[0] in ROOMS:
            return WRONG
    return None


def _end(args: list[str], error: BaseException, status: int | None, text: str) -> int:
    """Say how it ended, in one line, or with a traceback where the fault is ours; of several ranks only one does."""
    if rank_here().ranks > 1:
        from pipeline.crew import ending

        status, text = ending(error, status, text)
    if status is None or "--debug" in args:
        print(without_secrets("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    if status is not None and text:
        print("permafrost: " + " ".join(text.split()), file=sys.stderr)
    return FAILED if status is None else status


if __name__ == "__main__":
    sys.exit(main())
