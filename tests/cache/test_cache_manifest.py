from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.errors import CacheError, DamagedCache, StaleCache
from cache.manifest import (
    CacheManifest,
    atomic_write,
    cache_folder_name,
    check_spec,
    read_manifest,
    seal,
    unseal,
    write_manifest,
)

ROOT = Path(__file__).parents[2]


def test_deciding_needs_neither_torch_nor_zarr() -> None:
    modules = "cache.codecs, cache.manifest, cache.size, cache.layout, cache.order, cache.verify, cache.config"
    code = f"import sys, {modules}; print(sorted({{'torch', 'zarr'}} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_round_trips_through_a_dict(tmp_path: Path, example) -> None:
    manifest, _ = example().build(tmp_path)
    assert CacheManifest.from_dict(json.loads(json.dumps(manifest.to_dict()))) == manifest


def test_says_what_the_contract_lists(tmp_path: Path, example) -> None:
    example(parent="ab" * 32).build(tmp_path)
    values = json.loads((tmp_path / "manifest.json").read_text())
    assert set(values) >= {"format", "fingerprint", "spec", "parent", "num_samples", "num_tokens", "width", "views"}
    assert set(values) >= {"backend", "shards", "stats", "complete"}
    assert set(values["shards"][0]) >= {"name", "first_row", "rows", "bytes", "checksum"}
    assert set(values["stats"][0]) == {"mean", "std", "max_abs"}
    assert set(values["errors"][0]) == {"relative_rmse", "max_abs"} and values["accumulated_error"] >= 0
    assert values["parent"] == values["spec"]["parent"] == "ab" * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "cache holds seed=0, wanted seed=5; run `make explain`"),
        ({"weights": "91" * 32}, "cache holds weights=3f3f3f3f…, wanted weights=91919191…; run `make explain`"),
        (
            {"cut": 6, "weights": "91" * 32},
            "cache holds weights=3f3f3f3f… cut=3, wanted weights=91919191… cut=6; run `make explain`",
        ),
        (
            {"view_transform": "other"},
            "cache holds view_transform=crop, wanted view_transform=other; run `make explain`",
        ),
    ],
)
def test_another_spec_is_refused_by_the_field(tmp_path: Path, example, changes: dict, message: str) -> None:
    manifest, _ = example().build(tmp_path)
    check_spec(manifest, manifest.spec)
    with pytest.raises(StaleCache) as caught:
        check_spec(manifest, replace(manifest.spec, **changes))
    assert str(caught.value) == message


def test_another_version_is_stale_not_damaged(tmp_path: Path, example) -> None:
    manifest, _ = example().build(tmp_path)
    write_manifest(tmp_path, replace(manifest, format=1))
    with pytest.raises(StaleCache, match=f"{tmp_path}/manifest.json has format 1, this version reads 3"):
        read_manifest(tmp_path)
    values = manifest.to_dict()
    values["spec"]["colour"] = "blue"
    atomic_write(tmp_path / "manifest.json", seal(values))
    with pytest.raises(StaleCache, match=r"was written by another version .*colour"):
        read_manifest(tmp_path)


def test_a_torn_manifest_is_damage(tmp_path: Path, example) -> None:
    example().build(tmp_path)
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    for kept in (0, 1, 100, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(DamagedCache, match=f"{path} is altered or cut short; run `make repair`"):
            read_manifest(tmp_path)


@given(
    values=st.dictionaries(
        st.text(max_size=3).filter(lambda key: key != "checksum"), st.integers() | st.text(), min_size=1
    ),
    data=st.data(),
)
def test_no_byte_under_a_seal_can_change(values: dict, data: st.DataObject) -> None:
    content = seal(values)
    assert unseal(content) == values
    assert list(json.loads(content)) == [*values, "checksum"]
    place = data.draw(st.integers(0, len(content) - 1))
    altered = bytearray(content)
    altered[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match="seal"):
        unseal(bytes(altered))


def test_folder_name(example) -> None:
    spec = example().layout.spec
    assert cache_folder_name(spec) == f"cut-3-{spec.fingerprint[:8]}"
    assert cache_folder_name(replace(spec, seed=1)) != cache_folder_name(spec)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def fail(source: Path, target: Path) -> Path:
        raise OSError(5, "Input/output error")

    with (
        monkeypatch.context() as patch,
        pytest.raises(CacheError, match=f"cannot write {path} .3 bytes.: Input/output error"),
    ):
        patch.setattr(Path, "replace", fail)
        atomic_write(path, b"new")
    assert [(child.name, child.read_bytes()) for child in tmp_path.iterdir()] == [("file", b"old")]
