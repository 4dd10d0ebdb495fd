"""A limit keeps classes in proportion, whatever their order in the list, and takes what it always took where it did."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.config import ModelConfig
from models.vit import Encoder, build_encoder
from stages.config import DataConfig, EvalConfig
from stages.images import Data, ImageList, open_data, open_images, spread, spread_by_class
from stages.probe import evaluate


def counts(labels: np.ndarray, rows: np.ndarray) -> list[int]:
    """How many rows of each class."""
    return np.bincount(labels[rows], minlength=labels.max() + 1).tolist()


@pytest.mark.parametrize("stride", [4, 5, 10, 25, 100, 5000])
def test_classes_that_take_turns_are_all_kept(stride: int) -> None:
    labels, limit = np.arange(50_000) % 10, 50_000 // stride
    assert min(counts(labels, spread(50_000, limit))) == 0, "steps of this length meet some classes only"
    rows = spread_by_class(labels, limit)
    assert counts(labels, rows) == [limit // 10] * 10
    assert len(set(rows)) == limit and rows.tolist() == sorted(rows)
    assert np.abs(np.bincount(rows // 10_000, minlength=5) - limit / 5).max() <= 10, "from all of the list"


def test_half_of_the_classes_are_missed_by_steps_that_are_just_off() -> None:
    """98.04 of 100 classes that take turns: each that is met is met ten times instead of five."""
    labels = np.arange(50_000) % 100
    assert counts(labels, spread(50_000, 510)).count(0) == 49
    assert set(counts(labels, spread_by_class(labels, 510))) == {5, 6}


def test_a_share_of_a_small_class_is_its_share_of_the_list() -> None:
    """Every tenth of 3 classes that take 1000, 100 and 10 turns of 1110, and images without labels between all."""
    turn = np.repeat([0, 1, 2], [100, 10, 1])
    labels = np.stack([np.tile(turn, 20), np.full(2220, -1)], axis=1).ravel()
    assert set(labels[spread(4440, 444)]) == {0, 1, 2}, "steps of ten meet no image without a label"
    found = np.bincount(labels[spread_by_class(labels, 444)] + 1)
    assert found.tolist() == [222, 200, 20, 2]


@pytest.mark.parametrize("limit", [1, 7, 50, 100, 500, 510, 1000, 1999])
def test_what_was_in_proportion_is_taken_as_before(limit: int) -> None:
    """To the row: the sample, as it lies and sorted, lists in a random order, with a long tail, and without labels."""
    noise, sample = np.random.default_rng(limit), open_images("sample").labels
    tail = 1 / np.arange(1, 201)
    lists = [sample, np.sort(sample), np.full(2000, -1), np.arange(2000)]
    lists += [noise.integers(-1, classes, 50_000) for classes in (1, 2, 10, 100, 1000) for _ in range(5)]
    lists += [noise.choice(200, 50_000, p=tail / tail.sum()) for _ in range(5)]
    for labels in lists:
        before = np.arange(limit) * len(labels) // limit
        assert np.array_equal(spread_by_class(labels, limit), before)


@pytest.mark.parametrize(("classes", "limit"), [(2, 1500), (2, 1400), (10, 1500)])
def test_classes_that_take_turns_are_not_taken_two_to_one(classes: int, limit: int) -> None:
    """Every fourth row is left out, always of the same classes."""
    labels = np.arange(2000) % classes
    assert np.bincount(labels[spread_by_class(labels, limit)]).tolist() == [limit // classes] * classes


def test_no_limit_takes_all_and_nothing_has_nothing() -> None:
    labels = np.arange(6) % 2
    assert [spread_by_class(labels, limit).tolist() for limit in (0, 6, 9)] == [[0, 1, 2, 3, 4, 5]] * 3
    assert spread_by_class(labels[:0], 3).tolist() == []


# --- where it tells ---------------------------------------------------------------------------------------------------


def test_data_limit_keeps_classes_that_take_turns(tmp_path: Path, picture, pack) -> None:
    files = {f"{row:03d}.png": picture(row, size=(2, 2)) for row in range(80)}
    source = pack(tmp_path / "a.tar", files | {f"{row:03d}.cls": b"%d" % (row % 4) for row in range(80)})
    data = open_data(DataConfig(source=str(source), val_source="sample:val", limit=20))
    assert np.bincount(data.train.labels).tolist() == [5] * 4
    assert data.train.keys == open_data(DataConfig(source=str(source), val_source="sample:val", limit=20)).train.keys


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(ModelConfig(image_size=16, patch_size=4, width=24, depth=2, heads=2), seed=0)


def test_a_probe_with_a_limit_is_scored_on_all_classes(encoder: Encoder, colours: ImageList) -> None:
    """Of 40 images that are red and blue in turn half would all be red: kNN has half of the answers right, whatever
    the encoder."""
    data = Data(colours.only(range(40)), colours.only(range(40, 60)))
    result = evaluate(encoder, data, EvalConfig(knn_k=5, train_limit=20), 16, "cpu", "float32")
    assert (result.knn_top1, result.linear_top1, result.images) == (1.0, 1.0, 20)
