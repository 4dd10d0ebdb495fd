"""Probes trained by gradient descent: the optimiser's step by hand, rates that do not disturb each other, a winner that
the validation images have no say in, and what an attentive probe sees that a mean does not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages import sweep as module
from stages.sweep import Recipe, build_probe, held_back_rows, sweep, top1, train_probes

SGD = Recipe("sgd", rates=(1e-9, 0.3), epochs=20, batch=32, heads=2, seed=0)


def classes_of(count: int, spread: float = 1.0) -> tuple[Tensor, np.ndarray]:
    """Three clusters in 6 channels of very different sizes."""
    random = np.random.default_rng(0)
    labels = np.arange(count) % 3
    x = random.normal(size=(count, 6)) * spread
    x[:, :3] += 4 * np.eye(3)[labels]
    return torch.from_numpy(x * [1e-2, 1, 1, 1, 1, 1e2]).float(), labels


# --- what is held back ------------------------------------------------------------------------------------------------


def test_held_back_rows_have_every_class_in_its_share() -> None:
    labels = np.repeat([2, 0, 1], [20, 40, 10])
    fit, held = held_back_rows(labels, 0.2)
    assert sorted([*fit, *held]) == list(range(70))
    assert np.bincount(labels[held]).tolist() == [8, 2, 4]
    assert held_back_rows(np.array([1, 0, 1]), 0.2)[1].tolist() == [0], "the middle of the order 0, 1, 1"
    for share in (0.001, 0.999):
        assert [len(part) for part in held_back_rows(np.zeros(4), share)] == ([3, 1] if share < 0.5 else [1, 3])


# --- the optimisers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "lars"])
def test_two_steps_by_hand(kind: str) -> None:
    """MAE's LARS: a matrix's gradient is scaled by 0.001 |w| / |g|, a bias's is not; then momentum 0.9, as in SGD."""
    layer = nn.Linear(3, 2)
    optimizer = module.OPTIMIZERS[kind](layer)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    want = {name: p.detach().clone() for name, p in layer.named_parameters()}
    velocity = {name: torch.zeros_like(value) for name, value in want.items()}
    for step in range(2):
        for name, parameter in layer.named_parameters():
            gradient = torch.linspace(-1, 2, parameter.numel()).reshape(parameter.shape) + step
            parameter.grad = gradient.clone()
            if kind == "lars" and name == "weight":
                gradient = gradient * 0.001 * want[name].norm() / gradient.norm()
            velocity[name] = 0.9 * velocity[name] + gradient
            want[name] = want[name] - 0.5 * velocity[name]
        optimizer.step()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.detach(), want[name], rtol=1e-5, atol=1e-7)


def test_a_linear_probes_rate_grows_with_its_batch_and_falls_by_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.8 for 256 images is 0.1 for 32; 20 steps, of which 2 warm up; half way down after 9 of the 18 others."""
    seen: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def]
            seen.append(self.param_groups[0]["lr"])
            return super().step(closure)

    monkeypatch.setattr(module, "OPTIMIZERS", {"sgd": lambda probe: Watched(probe.parameters(), lr=0.0)})
    x, y = classes_of(64)
    train_probes(replace(SGD, epochs=10), (0.8,), x, y, 3)
    assert len(seen) == 20
    assert [seen[0], seen[1], seen[2], seen[11]] == pytest.approx([0.05, 0.1, 0.1, 0.05])


# --- the sweep --------------------------------------------------------------------------------------------------------


def test_a_sweep_takes_the_rate_that_is_best_on_held_back_training_images() -> None:
    x, y = classes_of(240)
    found = sweep(SGD, x[:160], y[:160], x[160:], y[160:], 0.2)
    assert found.rate == 0.3 and found.top1 > 0.95
    assert found.held_back[0.3] > 0.95 > 0.7 > found.held_back[1e-9]


def test_a_probe_that_has_diverged_scores_nothing() -> None:
    """Otherwise argmax takes the first NaN, and a probe of one class more often right than chance would win."""
    x, y = classes_of(30)
    (probe,) = train_probes(SGD, (0.3,), x, y, 3)
    assert top1(probe, x, y, SGD) > 0.9
    with torch.no_grad():
        probe.get_parameter("1.weight")[0, 0] = float("nan")
    assert top1(probe, x, np.zeros(30, int), SGD) == 0.0


def test_validation_labels_have_no_say_in_the_rate() -> None:
    x, y = classes_of(240, spread=3.0)
    recipe = replace(SGD, rates=(1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0))
    true = sweep(recipe, x[:160], y[:160], x[160:], y[160:], 0.2)
    false = sweep(recipe, x[:160], y[:160], x[160:], (y[160:] + 1) % 3, 0.2)
    assert (true.rate, true.held_back) == (false.rate, false.held_back) and true.top1 > 0.5 > false.top1
    best = max(true.held_back.values())
    assert true.held_back[true.rate] == best
    (again,) = train_probes(recipe, (true.rate,), x[:160], y[:160], 3)  # on all training images
    assert top1(again, x[160:], y[160:], recipe) == true.top1


@pytest.mark.parametrize("kind", ["sgd", "lars", "attentive"])
def test_probes_trained_together_are_those_trained_alone(kind: str) -> None:
    recipe = Recipe(kind, rates=(0.01, 0.1), epochs=3, batch=16, heads=2, seed=0)
    x, y = classes_of(50)
    if kind == "attentive":
        x = x.reshape(50, 1, 6).repeat(1, 4, 1)
    both = train_probes(recipe, recipe.rates, x, y, 3)
    for rate, together in zip(recipe.rates, both, strict=True):
        (alone,) = train_probes(recipe, (rate,), x, y, 3)
        assert all(torch.equal(alone.state_dict()[n], value) for n, value in together.state_dict().items())
    first, second = (probe.state_dict()[f"{len(probe) - 1}.weight"] for probe in both)  # type: ignore[arg-type]
    assert not torch.equal(first, second)


def test_channels_are_standardised_before_the_linear_layer() -> None:
    x, y = classes_of(200)
    found = [sweep(SGD, one[:150], y[:150], one[150:], y[150:], 0.2) for one in (x, x * 1e3 + 7)]
    assert found[0].top1 == pytest.approx(found[1].top1, abs=0.021) and found[1].top1 > 0.95
    probe = build_probe(SGD, 6, 3)
    assert [name for name, _ in probe.named_parameters()] == ["1.weight", "1.bias"], "the norm has no affine part"
    (trained,) = train_probes(replace(SGD, epochs=1, batch=50), (0.1,), x, y, 3)
    batches = x[torch.from_numpy(np.concatenate([module.batch_rows(0, 0, step, 200, 50) for step in range(4)]))]
    torch.testing.assert_close(trained.state_dict()["0.running_mean"], batches.mean(dim=0), rtol=1e-4, atol=1e-3)


def test_an_attentive_probe_finds_the_token_that_a_mean_drowns() -> None:
    """One of 16 tokens carries the class and a mark; the others are loud noise without the mark."""
    random = np.random.default_rng(1)
    y = np.arange(400) % 2
    x = random.normal(size=(400, 16, 8)) * 3
    x[:, :, 0] = 0
    place = random.integers(0, 16, 400)
    x[np.arange(400), place] = 0
    x[np.arange(400), place, 0] = 6
    x[np.arange(400), place, 1] = 4 * (2 * y - 1)
    tokens = torch.from_numpy(x).half()
    attentive = Recipe("attentive", rates=(1e-2, 3e-3), epochs=25, batch=32, heads=2, seed=0)
    found = sweep(attentive, tokens[:300], y[:300], tokens[300:], y[300:], 0.2)
    mean = tokens.float().mean(dim=1)
    linear = sweep(replace(SGD, rates=(0.1, 1.0)), mean[:300], y[:300], mean[300:], y[300:], 0.2)
    assert found.top1 > 0.9 > 0.75 > linear.top1


def test_a_sweep_leaves_torchs_generator_alone_and_is_the_same_again() -> None:
    x, y = classes_of(60)
    before = torch.get_rng_state()
    one = sweep(SGD, x[:40], y[:40], x[40:], y[40:], 0.25)
    assert torch.equal(torch.get_rng_state(), before)
    assert sweep(SGD, x[:40], y[:40], x[40:], y[40:], 0.25) == one
