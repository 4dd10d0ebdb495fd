from __future__ import annotations

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest

from cache.errors import CacheError
from cache.layout import Layout
from cache.size import array_bytes, cache_bytes, check_space, feature_bytes


@pytest.mark.parametrize("groups", [1, 4])
def test_prediction_matches_the_disk(tmp_path: Path, example, groups: int) -> None:
    wanted = example(300, 64, image_size=32, width=192, groups=groups, views=1)
    wanted.build(tmp_path)
    for array in wanted.layout.arrays:
        files = (tmp_path / f"data.zarr/view_0/{array.name}/c").rglob("*")
        assert array_bytes(wanted.layout, array) == sum(path.stat().st_size for path in files if path.is_file())
    total = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert abs(cache_bytes(wanted.layout) - total) < 0.005 * total
    assert 300 * 64 * 192 * 2 < feature_bytes(wanted.layout) <= 1.01 * 300 * 64 * 192 * 2


def test_imagenet_at_width_768(example) -> None:
    spec = replace(example().layout.spec, image_size=224, patch_size=16, width=768, groups=4, views=1, pixels=False)
    raw = 1_281_167 * 196 * 768 * 2
    assert raw / 1e9 == pytest.approx(385.7, abs=0.05)
    assert raw < feature_bytes(Layout(spec, 1_281_167, 256)) < 1.0004 * raw


def test_what_does_not_fit_is_refused_with_the_numbers(tmp_path: Path, example, monkeypatch) -> None:
    layout = example(pixels=False, views=1, groups=1).layout
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("cache.place.shutil.disk_usage", lambda path: usage(0, 0, cache_bytes(layout)))
    check_space(tmp_path / "not" / "yet", layout, layout.shards)
    monkeypatch.setattr("cache.place.shutil.disk_usage", lambda path: usage(0, 0, cache_bytes(layout) - 1))
    with pytest.raises(
        CacheError, match=r"needs 0\.0 GB more, its disk has 0\.0 GB; lower cache.views \(now 1\)"
    ):
        check_space(tmp_path / "not" / "yet", layout, layout.shards)
    check_space(tmp_path, layout, layout.shards[1:])  # what is there already needs no room
