"""How long an object store is waited for: which of its errors pass, how often and after which pauses a request is made
again, and how many were. Under everything in `cache.place` that asks a store; a disk is asked once. Free of torch.

Requests are repeated here and nowhere else: the clients' own repetitions, which nobody counts, are switched off.
"""

from __future__ import annotations

import errno
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from typing import TypeVar

Answer = TypeVar("Answer")

LONGEST_PAUSE = 30.0
"""Seconds, however often a request has failed."""
SENT_BADLY = frozenset({"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "RequestTimeout"})
"""S3's codes for a body that was altered or cut short on its way there: worth another try, though the error reads as
one of the request."""
EXPIRED = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestExpired"})
LASTING = (
    *(FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError, ValueError),
    *(TypeError, AttributeError, LookupError, ImportError),
)
LASTING_NUMBERS = frozenset({errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENAMETOOLONG, errno.EMSGSIZE})


@dataclass(frozen=True)
class StoreConfig:
    """How object stores are asked, for caches, images and checkpoints behind URLs. Keys are no setting: they come from
    the environment or the usual files."""

    retries: int = 5
    """How often a request is made again that failed for a reason that passes: a 5xx, no answer, a body cut short."""
    wait: float = 0.5
    """Seconds before the first repetition, of which a random part of up to a half is left out; each further one waits
    twice as long, 30 at most."""
    timeout: float = 60.0
    """Seconds without an answer, or for one ranged read in all, after which a request counts as failed."""
    part_mb: float = 50.0
    """Files of at least twice so many MiB are sent in parts of that size, by multipart upload. S3 takes no less than
    5."""


class CutShort(OSError):
    """A store gave or took another number of bytes than it was asked for: what broke is the connection."""


_settings = StoreConfig()
_repeated: Counter[str] = Counter()
_counting = Lock()


def use_store(settings: StoreConfig) -> None:
    """Ask stores by these settings from now on, in all of this process."""
    global _settings
    _settings = settings


def store_settings() -> StoreConfig:
    return _settings


def repeated() -> dict[str, int]:
    """How many requests this process has made again so far, by why."""
    with _counting:
        return dict(_repeated)


def patiently(ask: Callable[[], Answer], pause: Callable[[float], None] = time.sleep) -> Answer:
    """What `ask` returns, asked again while it fails for a reason that passes; its last error where that does not."""
    settings = _settings
    for attempt in range(settings.retries + 1):
        try:
            return ask()
        except Exception as error:
            if attempt == settings.retries or not passes(error):
                raise
            with _counting:
                _repeated[kind_of(error)] += 1
            longest = min(LONGEST_PAUSE, settings.wait * 2.0**attempt)
            pause(longest * random.uniform(0.5, 1.0))
    raise AssertionError("the last attempt returns or raises")


def passes(error: BaseException) -> bool:
    """Whether the same request may succeed when it is made again."""
    code = code_of(error)
    if code in SENT_BADLY or isinstance(error, CutShort | TimeoutError):
        return True
    if isinstance(error, LASTING) or is_refusal(error):
        return False
    return not (isinstance(error, OSError) and error.errno in LASTING_NUMBERS)


def is_refusal(error: BaseException) -> bool:
    """Whether a store refuses because of the keys: none, wrong, expired, or without the right."""
    no_keys = "credential" in type(error).__name__.lower()
    return no_keys or isinstance(error, PermissionError) or code_of(error) in EXPIRED


def code_of(error: BaseException) -> str:
    """S3's own word for an error; empty where it has none."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def kind_of(error: BaseException) -> str:
    """Why a request was made again, in a word or two."""
    if isinstance(error, CutShort) or any(word in type(error).__name__ for word in ("Payload", "IncompleteRead")):
        return "cut short"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return "too slow"
    if "Connect" in type(error).__name__:
        return "no connection"
    return code_of(error) or type(error).__name__
