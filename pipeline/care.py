"""`permafrost verify`, `repair` and `gc`: the caches of a run checked file by file, mended, and cleared away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cache.errors import CacheError, DamagedCache, LaterCache, MissingCache, StaleCache
from cache.layout import TARS
from cache.lock import CacheBusy, hold_cache
from cache.manifest import MANIFEST, read_manifest
from cache.place import files_below, is_there, matching
from cache.receipts import RECEIPTS
from cache.users import register
from cache.verify import Damage, Run, drop_manifest, in_threads, restore_manifest, verify_cache
from pipeline.config import ConfigError
from pipeline.decide import Wanted, judge_cache
from pipeline.desk import Desk, at_work
from pipeline.job import Job, RunFailed
from pipeline.layout import RunPaths
from pipeline.needs import Need
from pipeline.replay import replay
from pipeline.runner import ensure_built, ensure_maker
from pipeline.sharing import asked_for, other_users, remove_unused, used
from stages.errors import DataError


def run_verify(job: Job) -> None:
    """Hash every file of every cache in the run's folder of caches again, or compare the order of training with its
    record. RunFailed when something is damaged, or differs; what another version made is neither."""
    if job.order:
        replay(job)
        return
    bad, harmed, folders, wanted = 0, [], caches(job), Wanted(job.config, job.paths)
    if not folders:
        raise ConfigError(f"no cache in {job.paths.cache_root}; `make stage-1` builds one")
    with hashing(job, print) as run:
        for folder in folders:
            if in_progress(folder):
                print(f"{folder}: unfinished; `make stage-N` goes on with it")
                continue
            try:
                damages, told = findings(folder, run)
            except StaleCache as error:
                print(f"{folder}: {error}{way_on(wanted, folder)}")
                continue
            except LaterCache as error:
                print(f"{folder}: {error}")
                continue
            bad += len(damages)
            harmed += [folder] if damages else []
            for damage in damages:
                print(f"damaged: {damage.file}: {damage.what}")
            print(f"{folder}: {told}")
    if bad:
        raise RunFailed(f"{bad} damaged files; {remedies(wanted, harmed)}")


def findings(folder: Path, run: Run) -> tuple[list[Damage], str]:
    """The damage in a cache that was finished, and how it is in words. What another run removes in the meantime has no
    damage."""
    try:
        damages = check(folder, run)
        told = f"{len(damages)} damaged files" if damages else f"sound, {size(folder)}"
        gone = removed(folder) if damages else ""
    except MissingCache:
        if not (gone := removed(folder)):
            raise
    return ([], gone) if gone else (damages, told)


def removed(folder: Path) -> str:
    """In words that another run has removed a cache, or is about to, the manifest first; nothing if neither."""
    try:
        with hold_cache(folder):
            pass
    except CacheBusy as error:
        return "" if is_there(folder / MANIFEST) else str(error)
    except CacheError:  # nothing can be written here, which only looks
        pass
    return "" if is_there(folder) else "removed meanwhile"


def remedies(wanted: Wanted, harmed: Sequence[Path]) -> str:
    """What makes damaged caches whole, or ends them: whoever asks for a cache can mend it."""
    try:
        mended = set(mendable(wanted))
    except DataError:  # `repair` needs the images, and says what is wrong with them
        mended = set(harmed)
    found, strays = ["run `make repair`, which rebuilds only what is bad"] if mended & set(harmed) else [], []
    for folder in harmed:
        others = [] if folder in mended else other_users(wanted, folder)
        if others:
            there = f"CONFIG={RunPaths(Path(others[0].run)).config} RUN={others[0].run}"
            found.append(f"run `make repair {there}`, for {others[0]} uses {folder.name}")
        elif folder not in mended:
            strays.append(folder.name)
    found += [f"run `make gc`, which removes what no run asks for: {', '.join(strays)}"] if strays else []
    return "; ".join(found)


def way_on(wanted: Wanted, folder: Path) -> str:
    """How a cache that is to be built again is, or who else does that, or that nobody needs to; goes on from there."""
    try:
        need = mendable(wanted).get(folder)
    except DataError:  # who needs it is not known, and whoever does builds it
        return ""
    if need:
        return f" with `make {'finetune' if need.tunes else f'cache-{need.stage}'}`"
    if others := other_users(wanted, folder):
        return f", or let {others[0]}, which uses it, do that"
    return ", or run `make gc`, which removes it: no run asks for it"


def mendable(wanted: Wanted) -> dict[Path, Need]:
    """The caches that `repair` goes through, by folder, parents first; `gc` leaves no others but those of other runs.
    DataError where there are no images, by which caches are known."""
    return {wanted.cache_folder(spec): need for need in asked_for(wanted) if (spec := wanted.spec(need))}


@contextmanager
def hashing(job: Job, tell: Callable[[str], None]) -> Iterator[Run]:
    """What hashes files: the run's cluster where one is asked for, else threads of this process."""
    cluster = job.config.cluster
    if not cluster.elsewhere:
        yield in_threads
        return
    from pipeline.cluster import task_runner

    with task_runner(cluster, "cpu", tell) as run:
        yield run


def size(folder: Path) -> str:
    """The bytes of a finished cache, those of its features over two for each value, and what its codec has lost."""
    manifest = read_manifest(folder)
    total = sum(entry.bytes for entry in manifest.shards)
    parts = {"features", "scale", TARS}  # tars hold all arrays
    features = sum(entry.bytes for entry in manifest.shards if parts & set(entry.name.split("/")))
    values = manifest.num_samples * manifest.views * manifest.num_tokens * manifest.width
    lost = f"{manifest.spec.codec} has lost {max(error.relative_rmse for error in manifest.errors):.1e} (relative RMSE)"
    share = f"{features / 1e6:,.1f} MB, {features / (2 * values):.4f} of 2 bytes a value"
    return f"{total / 1e6:,.1f} MB; features {share}; {lost}"


def run_repair(job: Job) -> None:
    """Rebuild the damaged shards of the run's caches, and nothing else."""
    with at_work(job) as desk, hashing(job, desk.log.message) as run:
        for need in asked_for(desk.wanted):
            repair(desk, need, run)


def repair(desk: Desk, need: Need, run: Run = in_threads) -> None:
    """Mend a cache, where there is one; its parent was mended before it. What is sound stays, with its layout."""
    spec = desk.wanted.spec(need)
    folder = desk.wanted.cache_folder(spec) if spec else None
    if folder is None or not is_there(folder) or in_progress(folder):
        return
    try:
        read_manifest(folder)
    except StaleCache as error:  # nothing is damaged, and nothing of it is of use
        desk.log.message(f"{folder}: {error}")
        return
    except (DamagedCache, MissingCache):
        pass
    damages = check(folder, run)
    whole = not any(damage.file == MANIFEST for damage in damages)
    if not whole and restore_manifest(folder):
        desk.log.message(f"{folder}: manifest.json was damaged, its copy is in its place")
        damages, whole = check(folder, run), True
    desk.log.message(f"{folder}: {len(damages)} damaged files")
    if not damages:
        return
    from pipeline.building import mend_cache, weights_there

    if not weights_there(desk.wanted, need):
        ensure_maker(desk, need.maker)
        if desk.wanted.spec(need) != spec:
            desk.log.message(f"{folder}: the weights that made it are gone; `make gc` removes it")
            return
    if not whole:
        with hold_cache(folder, desk.log.message, desk.job.stop.is_set):
            drop_manifest(folder)
        ensure_built(desk, need)
        return
    if need.parent:
        ensure_built(desk, need.parent, [need])
    mend_cache(desk, need, damages)


def regain(desk: Desk, need: Need) -> bool:
    """Whether a finished cache that has lost its manifest is whole again: its copy is put back, and what does not hash
    to that mended, as `repair` does. Not where a build has begun since, which the copy knows nothing of."""
    spec = desk.wanted.spec(need)
    assert spec is not None, "a cache that lies on disk has a name"
    folder = desk.wanted.cache_folder(spec)
    try:
        with hold_cache(folder):
            if is_there(folder / RECEIPTS) or not restore_manifest(folder):
                return False
    except CacheBusy:  # somebody builds it, which is waited for elsewhere
        return False
    desk.log.message(f"{folder}: manifest.json was gone, its copy is in its place")
    with hashing(desk.job, desk.log.message) as run:
        repair(desk, need, run)
    return judge_cache(desk.wanted, need).current


def run_gc(job: Job) -> None:
    """Remove the caches that neither a stage of this run, as it is now configured, nor its fine-tuning needs, nor any
    other run that shares the folder."""
    with at_work(job) as desk:
        wanted, root = desk.wanted, job.paths.cache_root
        needed = used(wanted)
        register(root, job.paths.root, [folder.name for folder in needed])
        doomed = []
        for folder in caches(job):
            others = other_users(wanted, folder)
            if others:
                desk.log.message(f"kept: {folder}: used by {', '.join(map(str, others))}")
            elif folder not in needed:
                doomed.append(folder)
        if not doomed:
            desk.log.message("nothing to remove: every cache is one that the run's settings, or another run, ask for")
            return
        total = sum(map(bytes_of, doomed))
        desk.log.message("\n".join(f"not needed: {folder}" for folder in doomed))
        if not (job.yes or input(f"remove {len(doomed)} caches, {total / 1e9:.2f} GB? [y/N] ").strip().lower() == "y"):
            raise ConfigError("nothing removed; answer y, or give --yes")
        for folder in doomed:
            if why := remove_unused(wanted, folder):
                desk.log.message(f"kept: {folder}: {why}")


def bytes_of(folder: Path) -> int:
    """Bytes on disk; what another `gc` removes in the meantime counts nothing."""
    return sum(size for _, size in files_below(folder))


def caches(job: Job) -> list[Path]:
    """The cache folders of the run, finished or not."""
    return [folder for folder in matching(job.paths.cache_root, "cut-*") if is_there(folder)]


def in_progress(folder: Path) -> bool:
    """Whether a cache is being built, or waits for its build to go on: it has receipts and no manifest yet."""
    return is_there(folder / RECEIPTS) and not is_there(folder / MANIFEST)


def check(folder: Path, run: Run = in_threads) -> list[Damage]:
    """The damage in a cache that was finished. StaleCache or LaterCache where another version made it."""
    try:
        read_manifest(folder)
    except (DamagedCache, MissingCache) as error:
        return [Damage(file="manifest.json", what=str(error), rows=None, view=None)]
    return verify_cache(folder, run)
