"""Keeps the next batches ready while the model learns from this one: threads (a fork could deadlock) that call a pure
`make` for the items ahead, results in order, in a ring of memory that is used again. The last stop between a reader and
the training loop."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import Lock
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

from cache.buffers import Buffers
from cache.errors import CacheError

T = TypeVar("T")
U = TypeVar("U")


class Spent(NamedTuple):
    """What loading has cost so far."""

    wait_seconds: float = 0.0
    """How long the consumer has waited for batches."""
    busy_seconds: float = 0.0
    """How long the threads have worked, all together."""
    batches: int = 0
    """Made by them."""

    def since(self, before: Spent) -> Spent:
        """The difference."""
        return Spent(self[0] - before[0], self[1] - before[1], self[2] - before[2])


class Prefetch(Iterator[U], Generic[T, U]):
    """`make(item, into)` for every item, in order; a `with` block ends its threads however the block is left.

    `into` is memory in which make may put what it returns: it is filled again once the consumer asks for the result
    after it, and is page-locked where it goes to a GPU, `device`. No more than `ahead` results are made and not taken,
    and no more than `memory` bytes lie in the ring, results being of one size.
    Raises CacheError when not even the result in use and the next one fit in these.
    """

    def __init__(
        self,
        make: Callable[[T, Buffers], U],
        items: Iterable[T],
        threads: int,
        ahead: int,
        memory: float = float("inf"),
        device: str | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert ahead >= 1
        self.threads = threads
        self._make, self._items, self._now = make, iter(items), now
        self._most, self._memory, self._spent, self._lock = ahead, memory, Spent(), Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
        self._pending: deque[tuple[Future[U], Buffers]] = deque()
        self._free = [Buffers(device) for _ in range(ahead + 1)]
        self._taken: Buffers | None = None
        # How large a result is shows the first one; until then, where memory is limited, no other is begun.
        self._ahead = ahead if memory == float("inf") else 1
        self._submit()

    def __enter__(self) -> Prefetch[T, U]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> U:
        if self._taken is not None:
            self._taken.retire()
            self._free.append(self._taken)
            self._taken = None
        if not self._pending:
            self.close()
            raise StopIteration
        future, into = self._pending[0]
        start = self._now()
        try:
            result = future.result()
            self._ahead = self._fitting(into.nbytes)
        except BaseException:
            self.close()
            raise
        finally:
            self._add(Spent(wait_seconds=self._now() - start))
        self._pending.popleft()
        self._taken = into
        self._submit()
        return result

    @property
    def spent(self) -> Spent:
        """What loading has cost so far."""
        with self._lock:
            return self._spent

    def close(self) -> None:
        """Drops what is not begun and waits for what is; the iterator is then at its end."""
        self._pool.shutdown(cancel_futures=True)
        self._pending.clear()

    def _fitting(self, size: int) -> int:
        """How many results of `size` bytes may be made ahead, beside the one in use."""
        if 2 * size > self._memory:
            raise CacheError(
                f"two batches of {size / 1e6:.1f} MB do not fit the half of cache.memory_mb, "
                f"{self._memory / 1e6:.1f} MB, that is for batches; raise it to {math.ceil(4 * size / 2**20)} or lower "
                "train.batch_size"
            )
        return int(min(self._most, self._memory // size - 1)) if size else self._most

    def _submit(self) -> None:
        more = max(0, self._ahead - len(self._pending))  # fewer fit than are pending once a batch is larger
        for item in islice(self._items, more):
            into = self._free.pop()
            self._pending.append((self._pool.submit(self._work, item, into), into))

    def _work(self, item: T, into: Buffers) -> U:
        into.wait()
        start = time.perf_counter()
        result = self._make(item, into)
        self._add(Spent(busy_seconds=time.perf_counter() - start, batches=1))
        return result

    def _add(self, more: Spent) -> None:
        with self._lock:
            have = self._spent
            self._spent = Spent(have[0] + more[0], have[1] + more[1], have[2] + more[2])


def prefetch(make: Callable[[T], U], items: Iterable[T], threads: int, ahead: int) -> Prefetch[T, U]:
    """Iterator over `make(item)` in order, at most `ahead` made but not taken; exceptions come in their turn."""
    return Prefetch(lambda item, into: make(item), items, threads, ahead)
