"""Probes against slower or simpler definitions of the same, and monitors of collapse on matrices with known answers."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.config import ModelConfig
from models.targets import normalize_images
from models.vit import Encoder, build_encoder
from stages import probe
from stages.config import EvalConfig
from stages.images import Data, ImageList, open_images, spread
from stages.probe import collapse, evaluate, knn_top1, linear_top1, pooled_features
from stages.views import centre_view

SIZE = 16


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return build_encoder(ModelConfig(image_size=SIZE, patch_size=8, width=8, depth=2, heads=2), seed=0)


@pytest.fixture(scope="module")
def val() -> ImageList:
    return open_images("sample:val")


# --- kNN and linear probe ---------------------------------------------------------------------------------------------


def knn_by_loops(train_x, train_y, val_x, val_y, k: int) -> float:
    right = 0
    for x, y in zip(val_x, val_y, strict=True):
        similar = [float(x @ t) / math.sqrt(float(x @ x) * float(t @ t)) for t in train_x]
        votes: dict[int, float] = defaultdict(float)
        for nearest in sorted(range(len(train_x)), key=lambda row: -similar[row])[:k]:
            votes[int(train_y[nearest])] += math.exp(similar[nearest] / 0.07)
        right += max(votes, key=lambda label: votes[label]) == y
    return right / len(val_y)


@pytest.mark.parametrize("k", [1, 5, 20, 80])
def test_knn_is_that_of_plain_loops(k) -> None:
    random = np.random.default_rng(3)
    centres = random.normal(size=(4, 6))
    train_y, val_y = random.integers(0, 4, 80), random.integers(0, 4, 50)
    train_x, val_x = (centres[y] + random.normal(size=(len(y), 6)) * 1.5 for y in (train_y, val_y))
    want = knn_by_loops(train_x, train_y, val_x, val_y, k)
    assert 0.3 < want < 0.95
    assert knn_top1(train_x, train_y, val_x, val_y, k) == pytest.approx(want)


@pytest.mark.parametrize(("most", "rows"), [(1, [1] * 7), (59, [2, 2, 2, 1]), (60, [3, 3, 1]), (2**24, [7])])
def test_knn_compares_few_images_at_a_time(most: int, rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """7 images with 20: as many rows of similarities as make up `most` values, and one at least."""
    random, plain, seen = np.random.default_rng(4), np.argpartition, []
    train_y, val_y = random.integers(0, 3, 20), random.integers(0, 3, 7)
    train_x, val_x = random.normal(size=(20, 4)), random.normal(size=(7, 4))

    def argpartition(values: np.ndarray, *how: int, **more: int) -> np.ndarray:
        seen.append(values.shape)
        return plain(values, *how, **more)

    monkeypatch.setattr(np, "argpartition", argpartition)
    monkeypatch.setattr(probe, "SIMILARITIES", most)
    assert knn_top1(train_x, train_y, val_x, val_y, 3) == pytest.approx(knn_by_loops(train_x, train_y, val_x, val_y, 3))
    assert seen == [(count, 20) for count in rows]


def test_knn_votes_by_direction_and_nearness() -> None:
    """One very near neighbour outvotes two far ones; length counts for nothing; a label unseen in training is wrong."""
    train_x, train_y = np.array([[1.0, 0.01], [0.6, 0.8], [0.6, -0.8]]) * [[1], [50], [50]], np.array([0, 1, 1])
    query = np.array([[3.0, 0.0]])
    assert knn_top1(train_x, train_y, query, np.array([0]), k=3) == 1
    assert knn_top1(train_x, train_y, query, np.array([0]), k=99) == 1
    assert knn_top1(train_x, train_y, query, np.array([7]), k=3) == 0
    far = np.array([5, 10**12, 10**12])
    assert knn_top1(train_x, far, np.concatenate([query, -query]), np.array([5, 10**12]), k=3) == 1, "labels are names"


def test_a_linear_probe_separates_what_is_separable_and_only_that() -> None:
    random = np.random.default_rng(0)
    y = np.arange(300) % 3
    x = random.normal(size=(300, 5)) * [1e-3, 1, 1, 1, 1e3]
    x[:, 0] += y * 0.02  # tells the classes only once channels are standardised
    assert linear_top1(x[:200], y[:200], x[200:], y[200:]) >= 0.97
    noise = random.normal(size=(600, 5))
    assert linear_top1(noise[:300], y, noise[300:], y) < 0.45


def test_a_linear_probe_of_a_single_class() -> None:
    x = np.zeros((4, 2))
    assert linear_top1(x, np.array([1, 1, 1, 1]), x, np.array([1, 1, 1, 0])) == 0.75


# --- collapse ---------------------------------------------------------------------------------------------------------


def test_collapse_of_known_matrices() -> None:
    """+-e_i: every channel of D has standard deviation 1/sqrt(D), and all D directions are alike."""
    eye = np.concatenate([np.eye(8), -np.eye(8)]) * 5
    assert collapse(eye) == pytest.approx((8**-0.5, 8.0))
    line = np.linspace(-1, 1, 20)[:, None] * np.ones(8)
    assert collapse(line)[1] == pytest.approx(1.0)
    point = np.ones((20, 8))
    assert collapse(point) == pytest.approx((0.0, 1.0), abs=1e-6)


def test_effective_rank_is_the_exponential_of_an_entropy() -> None:
    """Singular values in the ratio 3 : 1 have shares 3/4 and 1/4."""
    x = np.zeros((4, 5))
    x[:, 0], x[:, 1] = [3, -3, 3, -3], [1, 1, -1, -1]
    assert collapse(x)[1] == pytest.approx(math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25))))


# --- features ---------------------------------------------------------------------------------------------------------


def test_features_are_the_mean_of_normed_tokens_of_centre_views(encoder, val) -> None:
    rows = val.only([3, 141, 59])
    found = pooled_features(encoder, rows, 2, SIZE, "cpu", "float32")
    assert found.shape == (3, 8) and found.dtype == np.float32
    for row in range(3):
        view = torch.from_numpy(centre_view(rows.image(row), SIZE).transpose(2, 0, 1).copy())[None]
        with torch.no_grad():
            tokens = encoder.vit.forward_features(normalize_images(view))
        np.testing.assert_allclose(found[row], tokens.mean(dim=1)[0].numpy(), rtol=1e-4, atol=1e-5)
    half = pooled_features(encoder, rows, 2, SIZE, "cpu", "bfloat16")
    assert half.dtype == np.float32 and 0 < np.abs(half - found).max() < 0.05


@pytest.mark.parametrize("learning", [True, False])
def test_the_encoder_is_left_as_it_was(encoder, val, learning) -> None:
    encoder.train(learning)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    pooled_features(encoder, val.only([0]), 1, SIZE, "cpu", "float32")
    assert encoder.training == learning and encoder.vit.blocks[0].training == learning
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_scores_what_can_be_told_apart(encoder, colours) -> None:
    data = Data(colours.only(range(40)), colours.only(range(40, 60)))
    result = evaluate(encoder, data, EvalConfig(knn_k=5), SIZE, "cpu", "float32")
    assert (result.knn_top1, result.linear_top1) == (1.0, 1.0)
    x = pooled_features(encoder, data.val, 7, SIZE, "cpu", "float32")
    assert (result.feature_std, result.effective_rank) == pytest.approx(collapse(x), rel=1e-3)
    assert 1 <= result.effective_rank <= 8


def test_limits_take_images_evenly_spread(encoder, colours, monkeypatch) -> None:
    from stages import probe

    seen = []

    def record(encoder, images, *rest):
        seen.append(images.keys)
        return pooled_features(encoder, images, *rest)

    monkeypatch.setattr(probe, "pooled_features", record)
    data = Data(colours.only(range(40)), colours.only(range(40, 60)))
    evaluate(encoder, data, EvalConfig(train_limit=12, val_limit=7), SIZE, "cpu", "float32")
    assert seen[1] == tuple(f"{row:02d}" for row in (0, 3, 6, 10, 13, 16, 20, 23, 26, 30, 33, 36))
    assert seen[0] == tuple(f"{row:02d}" for row in (40, 42, 45, 48, 51, 54, 57))
    assert np.diff(spread(2000, 300)).min() == 6 and np.diff(spread(2000, 300)).max() == 7


def test_images_without_labels_have_no_scores_but_monitors(encoder, colours, tmp_path, fill, picture) -> None:
    bare = open_images(str(fill(tmp_path, {"a.png": picture(), "b.png": picture(1), "c.png": picture(2)})))
    for data in (Data(bare, colours), Data(colours, bare), Data(bare, bare)):
        result = evaluate(encoder, data, EvalConfig(), SIZE, "cpu", "float32")
        assert result.knn_top1 is None and result.linear_top1 is None and result.effective_rank >= 1


def test_images_without_a_label_are_left_out_of_the_scores(encoder, colours) -> None:
    train, val = colours.only(range(40)), colours.only(range(40, 60))
    holes = replace(val, entries=tuple(replace(e, label=-1) if i % 2 else e for i, e in enumerate(val.entries)))
    with_holes = evaluate(encoder, Data(train, holes), EvalConfig(), SIZE, "cpu", "float32")
    assert with_holes == evaluate(encoder, Data(train, val.only(range(0, 20, 2))), EvalConfig(), SIZE, "cpu", "float32")
