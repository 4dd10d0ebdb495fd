"""What can go wrong with a cache. Each error is one line for the user: what, where, the bound, the remedy. Free of
torch, so that commands that only decide can tell a stale cache from a damaged one without loading the reader."""

from __future__ import annotations


class CacheError(ValueError):
    """A request that the cache cannot serve, or settings that are not built yet."""


class MissingCache(CacheError):
    """There is no finished cache at a path."""


class StaleCache(CacheError):
    """The cache holds something else than what is wanted."""


class LaterCache(CacheError):
    """A later version made the cache; this one neither reads it nor touches it."""


class DamagedCache(CacheError):
    """A file of the cache is missing, cut short or altered."""


class Unrepresentable(CacheError):
    """A feature is not finite, or too large for the codec."""


class TooCoarse(CacheError):
    """A cache, by itself or behind the caches before it, loses more than is allowed."""
