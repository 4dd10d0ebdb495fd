"""Keeps the next batches ready while the model learns from this one: threads (a fork could deadlock) that call a pure
`make` for the items ahead, results in order. The last stop between a reader and the training loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
U = TypeVar("U")


class Prefetch(Iterator[U], Generic[T, U]):
    """`make(item)` for every item, in order; a `with` block ends its threads however the block is left."""

    def __init__(
        self,
        make: Callable[[T], U],
        items: Iterable[T],
        threads: int,
        ahead: int,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert ahead >= 1
        self.wait_seconds = 0.0
        """How long the consumer has waited for batches, in all."""
        self._make, self._items, self._ahead, self._now = make, iter(items), ahead, now
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
        self._pending: deque[Future[U]] = deque()
        self._submit()

    def __enter__(self) -> Prefetch[T, U]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> U:
        if not self._pending:
            self.close()
            raise StopIteration
        start = self._now()
        try:
            result = self._pending[0].result()
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_seconds += self._now() - start
        self._pending.popleft()
        self._submit()
        return result

    def close(self) -> None:
        """Drops what is not begun and waits for what is; the iterator is then at its end."""
        self._pool.shutdown(cancel_futures=True)
        self._pending.clear()

    def _submit(self) -> None:
        for item in islice(self._items, self._ahead - len(self._pending)):
            self._pending.append(self._pool.submit(self._make, item))


def prefetch(make: Callable[[T], U], items: Iterable[T], threads: int, ahead: int) -> Prefetch[T, U]:
    """Iterator over `make(item)` in order, at most `ahead` made but not taken; exceptions come in their turn."""
    return Prefetch(make, items, threads, ahead)
