"""What is evaluated on was not trained on: the same content on both sides is refused, or left out and told."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.config import DataConfig
from stages.errors import DataError
from stages.images import Data, open_data


@pytest.fixture
def train(tmp_path: Path, picture, fill) -> Path:
    return fill(tmp_path / "train", {f"{row:02d}.png": picture(row) for row in range(60)})


def val_of(train: Path, fill, picture, *numbers: int) -> Path:
    return fill(train.with_name("val"), {f"v{number}.png": picture(number) for number in numbers})


def refusal(data: DataConfig) -> str:
    with pytest.raises(DataError) as caught:
        open_data(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_evaluation_images_that_are_training_images_are_refused(train: Path, picture, fill) -> None:
    val = val_of(train, fill, picture, 70, 7, 71, 3)
    assert refusal(DataConfig(source=str(train), val_source=str(val))) == (
        f"2 of 4 images of {val} are training images, too, first v3.png, the same as 03.png in {train}; leave them out "
        "of one (DATA, DATA_VAL), or out of the evaluation with data.on_bad=skip"
    )
    assert refusal(DataConfig(source=str(train), val_source=str(train))).startswith("60 of 60 images of ")
    assert "2 of 4" in refusal(DataConfig(source=str(train), val_source=str(val), limit=1)), "whatever is trained on"


def test_they_can_be_left_out_of_the_evaluation(train: Path, picture, fill) -> None:
    """As of data sets that lie as they are published."""
    val = val_of(train, fill, picture, 70, 7, 71, 3)
    data = open_data(DataConfig(source=str(train), val_source=str(val), on_bad="skip"))
    assert len(data.train) == 60 and data.val.keys == ("v70.png", "v71.png")
    assert data.twins == (("v3.png", "03.png"), ("v7.png", "07.png"))
    told = refusal(DataConfig(source=str(train), val_source=str(train), on_bad="skip"))
    assert told == (
        f"all 60 images to evaluate on are training images of {train}, too, first 00.png; name others with "
        "data.val_source (DATA_VAL)"
    )


def test_a_held_out_image_with_a_twin_in_training_is_not_evaluated_on(train: Path, picture, fill) -> None:
    """The others stay on their sides, so that nothing that is trained or cached changes."""
    before = open_data(DataConfig(source=str(train)))
    assert before.twins == () and len(before.train) + len(before.val) == 60 and len(before.val) > 2
    held, kept = before.val.keys[0], before.train.keys[5]
    (train / held).write_bytes((train / kept).read_bytes())
    data = open_data(DataConfig(source=str(train)))
    assert data.train.digest == before.train.digest and data.val.keys == before.val.keys[1:]
    assert data.twins == ((held, kept),)


def test_twins_on_one_side_stay(train: Path) -> None:
    before = open_data(DataConfig(source=str(train)))
    for keys in (before.train.keys, before.val.keys):
        (train / keys[0]).write_bytes((train / keys[1]).read_bytes())
    data: Data = open_data(DataConfig(source=str(train)))
    assert (data.train.keys, data.val.keys, data.twins) == (before.train.keys, before.val.keys, ())
