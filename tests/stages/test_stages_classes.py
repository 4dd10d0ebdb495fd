"""Classes that mean something: a data set's parts are none, and two numberings are never mixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.config import DataConfig
from stages.errors import DataError
from stages.images import open_data, open_images
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
