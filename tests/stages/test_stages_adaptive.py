"""What counts as settled: measures with values worked out by hand, and counts in a row."""

from __future__ import annotations

import math

import pytest
import torch

from stages.adaptive import Settle, linear_cka, relative_change


def test_relative_change_by_hand() -> None:
    before = torch.tensor([[3.0, 0.0], [0.0, 4.0]])  # norm 5
    assert relative_change(before + torch.tensor([[0.3, 0.0], [0.4, 0.0]]), before) == pytest.approx(0.1)
    assert relative_change(before, before) == 0.0
    assert relative_change(2 * before, before) == pytest.approx(1.0)
    assert relative_change(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_change(torch.ones(2), torch.zeros(2)) == math.inf


def test_cka_of_rotated_and_scaled_features_is_one() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    assert linear_cka(features @ rotation, features) == pytest.approx(1.0, abs=1e-12)
    assert linear_cka(7.5 * features + 3.0, features) == pytest.approx(1.0, abs=1e-12)
    assert relative_change(features @ rotation, features) > 0.5, "which the relative change does not forgive"


def test_cka_by_hand() -> None:
    """Columns a and b are orthogonal, centred, of squared norm 4. Against a alone, (a, b) shares half its kernel:
    ||[a b]'a||² = 16, ||[a b]'[a b]|| = sqrt(2) 4, ||a'a|| = 4, so CKA = 16 / (4 sqrt(2) 4) = 1 / sqrt(2)."""
    a, b = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.tensor([1.0, -1.0, 1.0, -1.0])
    both, one, other = torch.stack([a, b], dim=1), a[:, None], b[:, None]
    assert linear_cka(both, one) == pytest.approx(1 / math.sqrt(2))
    assert linear_cka(one, both) == pytest.approx(1 / math.sqrt(2)), "it is symmetric"
    assert linear_cka(one, other) == 0.0
    assert linear_cka(both, torch.stack([b, -a], dim=1)) == pytest.approx(1.0), "a quarter turn"


def test_cka_of_constant_features() -> None:
    still = torch.ones(4, 2)
    assert linear_cka(still, 3 * still) == 1.0
    assert linear_cka(still, torch.arange(8.0).reshape(4, 2)) == 0.0


def test_measures_of_a_batch_of_tokens() -> None:
    """(B, L, D) features; CKA is over all tokens."""
    features = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    change, cka = Settle("change", 0.1, 2), Settle("cka", 0.1, 2)
    assert change.measure(1.25 * features, features) == pytest.approx(0.25)
    assert cka.measure(1.25 * features, features) == pytest.approx(0.0, abs=1e-9)
    turned = features[..., [1, 0, 2, 3]]
    assert cka.measure(turned, features) == pytest.approx(0.0, abs=1e-9) and change.measure(turned, features) > 0.1
    flat = features.reshape(15, 4)
    assert cka.measure(features.flip(0), features) == 1 - linear_cka(features.flip(0).reshape(15, 4), flat)


def test_settled_is_below_the_bound_several_times_in_a_row() -> None:
    rule = Settle("change", 0.1, 2)
    series = ([], [0.05], [0.05, 0.2], [0.2, 0.05, 0.0], [0.1])
    assert [rule.in_a_row(measures) for measures in series] == [0, 1, 0, 2, 0]
    assert not rule.settled([0.05, 0.2, 0.05]) and rule.settled([0.2, 0.05, 0.09])
    assert not rule.settled([0.05, math.nan]), "no number is no rest"
