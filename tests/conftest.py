"""Shapes are checked while tests run: a suffix such as `tokens_BLD` is the annotation. Whatever `models` takes or holds
under such a name must have these axes, and a letter means one size within a call. In production this costs nothing.
`cache` is left out: in a batch of one token group, L is the group's tokens for features and all tokens for pixels."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
from beartype import beartype
from jaxtyping import Shaped, jaxtyped

from cache.patience import use_store
from tests.faulty import THROUGH_PROXY, FaultyStore
from tests.object_store import IMPATIENT, ObjectStore

SUFFIX = re.compile(r"[a-z0-9]_([A-Z]+)$")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its suffixes enforced, or itself where no parameter has one."""
    axes = {
        name: " ".join(found[1]) for name in inspect.signature(function).parameters if (found := SUFFIX.search(name))
    }
    if not axes:
        return function
    hints = typing.get_type_hints(function)
    function.__annotations__ = hints | {name: shaped(hints[name], letters) for name, letters in axes.items()}
    return jaxtyped(function, typechecker=beartype)


def shaped(hint: Any, letters: str) -> Any:
    """The hint with axes; `Tensor | None` stays optional."""
    if type(None) in typing.get_args(hint):
        (kind,) = (part for part in typing.get_args(hint) if part is not type(None))
        return Shaped[kind, letters] | None
    return Shaped[hint, letters]


class ShapeLoader(SourceFileLoader):
    """Loads a module, then wraps its functions, methods and dataclasses' constructors."""

    def exec_module(self, module: types.ModuleType) -> None:
        super().exec_module(module)
        own = [value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__]
        for owner in [module, *filter(inspect.isclass, own)]:
            for name, value in list(vars(owner).items()):
                if inspect.isfunction(value) and value.__module__ == module.__name__:
                    setattr(owner, name, checked(value))


class ShapeFinder(MetaPathFinder):
    """Hands the modules of `models` to `ShapeLoader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        found = PathFinder.find_spec(fullname, path, target) if fullname.startswith("models.") else None
        if found and found.origin and isinstance(found.loader, SourceFileLoader):
            found.loader = ShapeLoader(fullname, found.origin)
        return found


sys.meta_path.insert(0, ShapeFinder())

# No test's files have to outlive a power cut, and that what is written is synced before it has its name is told by the
# calls; waiting for the disk took a twelfth of a toy run. Processes that tests start do wait.
os.fsync = lambda descriptor: None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with many: pytest-xdist hands out whole files in this order, and whoever
    takes a long one last keeps the others waiting."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (-slow[item.path], -tests[item.path]))


@pytest.fixture(scope="session", autouse=True)
def sample_listed_once() -> Iterator[None]:
    """The sample's index is made once by a process of tests, where no run has one on disk: it took almost half of the
    processor time of a toy run."""
    from stages import index
    from stages.images import SAMPLE

    plain, listed = index.kept_or_made, {}

    def once(file: Path | None, header: dict[str, Any], make: Callable[[], index.Index]) -> index.Index:
        def made() -> index.Index:
            key = json.dumps(header)
            if key not in listed:
                listed[key] = make()
            return listed[key]

        return plain(file, header, made if header["source"].startswith(str(SAMPLE)) else make)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "kept_or_made", once)
        yield


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """A running object store; the environment names it."""
    store = ObjectStore.over(tmp_path_factory.getbasetemp())
    with pytest.MonkeyPatch.context() as patch:
        for name, value in store.environment.items():
            patch.setenv(name, value)
        store.start()
        use_store(IMPATIENT)
        yield store
        store.stop()


@pytest.fixture(scope="session")
def proxy(object_store: ObjectStore) -> Iterator[FaultyStore]:
    """A proxy in front of the object store."""
    proxy = FaultyStore(object_store)
    yield proxy
    proxy.stop()


@pytest.fixture
def faulty(proxy: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """The proxy, without a fault, which the environment names instead of the store."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    proxy.faults, _ = [], proxy.seen.clear()
    use_store(THROUGH_PROXY)
    yield proxy
    use_store(IMPATIENT)
