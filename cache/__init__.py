"""What is kept: features on disk, never wrong without an error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cache.backends import open_cache

__all__ = ["open_cache"]


def __getattr__(name: str) -> Any:
    # Lazy: commands that only read manifests must answer in a second, and torch alone takes two.
    if name == "open_cache":
        from cache.backends import open_cache

        return open_cache
    raise AttributeError(f"module 'cache' has no attribute {name!r}")
