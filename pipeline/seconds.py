"""What building caches has cost a run so far, kept beside the stage that is the first to read them. Free of torch."""

from __future__ import annotations

import json

from cache.manifest import atomic_write
from pipeline.layout import StagePaths


def read_seconds(paths: StagePaths, fingerprint: str) -> float:
    """What a cache has cost to build so far, in seconds, over all interruptions."""
    return spent_seconds(paths).get(fingerprint, 0.0)


def write_seconds(paths: StagePaths, fingerprint: str, seconds: float) -> None:
    paths.root.mkdir(parents=True, exist_ok=True)
    atomic_write(paths.root / "cache.json", json.dumps(spent_seconds(paths) | {fingerprint: seconds}).encode())


def spent_seconds(paths: StagePaths) -> dict[str, float]:
    """Seconds by fingerprint of every cache that was built for a stage."""
    file = paths.root / "cache.json"
    return dict(json.loads(file.read_text())) if file.exists() else {}
