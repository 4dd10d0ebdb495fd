"""Classes that mean something: a data set's parts are none, and two numberings are never mixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.config import DataConfig
from stages.errors import DataError
from stages.images import Data, open_data, open_images
from tests.object_store import ObjectStore


def refusal(source: object, val_source: object = "") -> str:
    with pytest.raises(DataError) as caught:
        open_data(DataConfig(source=str(source), val_source=str(val_source)))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the root of a data set -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "remedy"),
    [
        (("train", "val"), "give {0}/train with DATA and {0}/val with DATA_VAL"),
        (("Testing", "Training"), "give {0}/Training with DATA and {0}/Testing with DATA_VAL"),
        (("test", "train", "valid"), "give {0}/train with DATA and {0}/test or {0}/valid with DATA_VAL"),
        (("train",), "give {0}/train instead"),
        (("test", "validation"), "give {0}/test or {0}/validation instead"),
    ],
)
def test_parts_of_a_data_set_are_no_classes(tmp_path: Path, picture, fill, parts, remedy) -> None:
    fill(tmp_path, {f"{part}/{name}/1.png": picture() for part in parts for name in ("cat", "dog")})
    told = f"{tmp_path} holds parts of a data set ({', '.join(parts)}) and no classes; "
    assert refusal(tmp_path) == told + remedy.format(tmp_path)


def test_a_train_beside_other_things_is_a_class(tmp_path: Path, picture, fill) -> None:
    fill(tmp_path, {"bus/1.png": picture(), "train/1.png": picture()})
    assert open_images(str(tmp_path)).labels.tolist() == [0, 1]


def test_parts_at_a_url_are_no_classes_either(object_store: ObjectStore, tmp_path: Path, picture, fill) -> None:
    url = object_store.url(fill(tmp_path / "root", {"train/cat/1.png": picture(), "val/cat/1.png": picture()}))
    assert f"give {url}/train with DATA and {url}/val with DATA_VAL" in refusal(url)


# --- two numberings ---------------------------------------------------------------------------------------------------


@pytest.fixture
def named(tmp_path: Path, picture, fill) -> Path:
    return fill(tmp_path / "named", {"cat/1.png": picture(1), "dog/2.png": picture(2)})


def numbered(path: Path, pack, picture, label: bytes | None) -> Path:
    return pack(path, {"3.png": picture(3)} | ({} if label is None else {"3.cls": label}))


def test_named_and_numbered_classes_are_not_compared(named: Path, tmp_path: Path, picture, pack) -> None:
    """Class 0 of a tar may be any of the folders."""
    tar = numbered(tmp_path / "a.tar", pack, picture, b"0")
    for train, val, first, other in ((named, tar, named, tar), (tar, named, named, tar)):
        assert refusal(train, val) == (
            f"{first} names its classes by folders and {other} numbers them, so nothing tells which is which; give "
            "both as folders, or both as tars with <key>.cls"
        )


def test_one_numbering_or_none_is_fine_beside_names(named: Path, tmp_path: Path, picture, pack) -> None:
    def labels(data: Data) -> tuple[list[int], list[int]]:
        return data.train.labels.tolist(), data.val.labels.tolist()

    bare, tar = (numbered(tmp_path / f"{label}.tar", pack, picture, label) for label in (None, b"1"))
    other = pack(tmp_path / "other.tar", {"4.png": picture(4), "4.cls": b"0"})
    assert labels(open_data(DataConfig(source=str(named), val_source=str(bare)))) == ([0, 1], [-1])
    assert labels(open_data(DataConfig(source=str(bare), val_source=str(named)))) == ([-1], [0, 1])
    assert labels(open_data(DataConfig(source=str(tar), val_source=str(other)))) == ([1], [0])
