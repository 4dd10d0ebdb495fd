"""The next generations of a ring of views, made by a thread beside the training that reads the current one. Each side
holds the other back: nothing is begun beyond what training has allowed, and training waits for what is not finished.
Stands between `ring`, which turns, and whatever makes a generation; knows of neither caches nor clusters. Free of
torch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

from pipeline.job import Interrupted

T = TypeVar("T")

POLL_SECONDS = 0.1
"""Between two looks at whether training is asked to stop."""


class EitherStop(threading.Event):
    """Set when it is set itself, or when another is."""

    def __init__(self, other: threading.Event) -> None:
        super().__init__()
        self.other = other

    def is_set(self) -> bool:
        return super().is_set() or self.other.is_set()


class Ahead(Generic[T]):
    """Makes generations in order, as far as allowed.

    start: opens what `make` works with, for as long as nothing fails. make: makes a generation; it looks at `stopping`
    and raises Interrupted. tell: hears at once what has failed; whoever waits for that generation then makes it.
    """

    def __init__(
        self,
        start: Callable[[], AbstractContextManager[T]],
        make: Callable[[int, T], None],
        tell: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        self._start, self._make, self._tell = start, make, tell
        self.stopping = EitherStop(stop)
        self.started = threading.Event()
        """Set once `start` has been opened, or has failed, for the first time."""
        self._next, self._last = 0, -1
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="views ahead", daemon=True)

    def allow(self, first: int, last: int) -> None:
        """Let generations `first` to `last` be made; those before `first` are not wanted any more."""
        with self._news:
            self._next, self._last = max(self._next, first), last
            self._news.notify_all()
        if not self._thread.ident and first <= last:
            self._thread.start()

    def wait(self, generation: int) -> None:
        """Until a generation that was allowed is made, or making it has failed. Interrupted when asked to stop."""
        with self._news:
            while self._next <= min(generation, self._last) and self._thread.is_alive():
                if self.stopping.is_set():
                    raise Interrupted(
                        f"interrupted while waiting for generation {generation} of the ring of views; the same command "
                        "goes on from there"
                    )
                self._news.wait(POLL_SECONDS)

    def close(self) -> None:
        """End; what is half made stays as it is."""
        with self._news:
            self.stopping.set()
            self._news.notify_all()
        if self._thread.ident:
            self._thread.join()

    def _work(self) -> None:
        while self._due():
            try:
                with self._start() as tools:
                    self.started.set()
                    while self._due():
                        self._make(self._next, tools)
                        with self._news:
                            self._next += 1
                            self._news.notify_all()
            except Interrupted:
                break
            except Exception as error:  # whatever it is, training must hear of it and not wait for ever
                with self._news:
                    failed, self._last = self._next, self._next - 1
                    self._news.notify_all()
                what = " ".join(str(error).split())
                self.started.set()
                self._tell(f"generation {failed} of the ring of views: {what}; tried again when training needs it")

        self.started.set()

    def _due(self) -> bool:
        """Waits until there is something to make; False once it is to end."""
        with self._news:
            while self._next > self._last and not self.stopping.is_set():
                self._news.wait(POLL_SECONDS)
            return not self.stopping.is_set()
