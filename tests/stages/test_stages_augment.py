"""RandAugment against timm's operations driven by hand, and mixing against its definition; both pure functions."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import LEVEL_TO_ARG, AugmentOp, rand_augment_choices

from stages import augment
from stages.augment import LEVELS, Mixer, augmenter, rand_augment, smoothed
from stages.config import FinetuneConfig


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """A smooth picture with an edge, 24 x 24."""
    ramp = np.linspace(0, 255, 24)
    picture = np.stack([np.add.outer(ramp, ramp) / 2, np.outer(ramp, ramp) / 255, np.tile(ramp, (24, 1))], axis=-1)
    picture[8:16, 8:16] = 200 - picture[8:16, 8:16] / 2
    return picture.astype(np.uint8)


# --- RandAugment ------------------------------------------------------------------------------------------------------


def test_operations_are_those_of_timms_increasing_set() -> None:
    assert list(LEVELS) == rand_augment_choices("", increasing=True)


@pytest.mark.parametrize("name", list(LEVELS))
@pytest.mark.parametrize("magnitude", [0.0, 3.7, 9.0, 10.0])
def test_each_operation_is_timms_at_the_same_magnitude(name: str, magnitude: float, pixels: np.ndarray) -> None:
    """timm draws the direction itself; over a few draws it gives exactly the pictures of our two directions."""
    hparams = {"img_mean": augment.HOW["fillcolor"], "interpolation": augment.HOW["resample"]}
    operation = AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)
    before = random.getstate()
    if (name, magnitude) == ("PosterizeIncreasing", 10.0):
        with pytest.raises(ValueError, match="bits must be"):  # timm keeps 0 bits, which Pillow refuses; we keep 1
            operation(Image.fromarray(pixels))
        operation.magnitude = 9.9
    theirs = {np.asarray(operation(Image.fromarray(pixels))).tobytes() for _ in range(24)}
    random.setstate(before)
    ours = {
        np.asarray(
            augment.NAME_TO_OP[name](Image.fromarray(pixels), *LEVELS[name](magnitude / 10, sign), **augment.HOW)
        ).tobytes()
        for sign in (-1, 1)
    }
    assert ours == theirs
    assert (LEVEL_TO_ARG[name] is None) == (LEVELS[name](0.9, 1) == ())


def test_a_view_is_augmented_as_its_draws_say(pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws by hand: the 4th operation (Rotate) at the median of its magnitude, to the left; the second is not done."""
    draws = np.array([3.5 / 15, 0.49, 0.5, 0.2, 0.0, 0.5, 0.9, 0.9])
    monkeypatch.setattr(augment, "uniform", lambda count, *parts: draws[:count])
    want = Image.fromarray(pixels).rotate(-27.0, resample=Image.Resampling.BICUBIC, fillcolor=(124, 116, 104))
    np.testing.assert_array_equal(rand_augment(9.0, 0, pixels, 1, "k"), np.asarray(want))


def test_half_of_the_operations_are_done_and_magnitudes_are_noisy(
    pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 400 views: 2 x 1/2 operations a view, mean magnitude 5 with deviation 1/2, every operation and direction."""
    shares: list[float] = []
    signs: list[int] = []

    def note(share: float, sign: int) -> tuple[()]:
        shares.append(share)
        signs.append(sign)
        return ()

    monkeypatch.setattr(augment, "LEVELS", {name: note for name in ("AutoContrast", "Equalize", "Invert")})
    for number in range(400):
        rand_augment(5.0, 0, pixels, 0, f"k{number}")
    assert len(shares) == pytest.approx(400, abs=45)  # sqrt(800 / 4) = 14
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01) and np.std(shares) == pytest.approx(0.05, abs=0.006)
    assert np.mean(signs) == pytest.approx(0, abs=0.2)


def test_augmentation_is_a_pure_function_in_any_thread(pixels: np.ndarray) -> None:
    change = augmenter(9.0, 3)
    assert change is not None and augmenter(0.0, 3) is None
    keys = [f"k{number}" for number in range(60)]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    alone = [change(pixels, 2, key) for key in keys]
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda key: change(pixels, 2, key), keys))
    assert all(np.array_equal(a, b) and a.dtype == np.uint8 for a, b in zip(alone, together, strict=True))
    changed = [not np.array_equal(pixels, one) for one in alone]
    assert 30 < sum(changed) < 60, "a quarter of the views stays as it is"
    other_view = [change(pixels, 3, key) for key in keys]
    other_seed = [rand_augment(9.0, 4, pixels, 2, key) for key in keys]
    for others in (other_view, other_seed):
        assert sum(np.array_equal(a, b) for a, b in zip(alone, others, strict=True)) < 20


# --- mixup and cutmix -------------------------------------------------------------------------------------------------


def mixer(**settings: float) -> Mixer:
    return Mixer(FinetuneConfig(**({"mixup": 0.0, "cutmix": 0.0} | settings)), seed=5)  # type: ignore[arg-type]


VALUES = torch.arange(4 * 2 * 6 * 6, dtype=torch.float32).reshape(4, 2, 6, 6)
EYE = torch.eye(4)


def test_mixup_blends_a_batch_with_its_reverse() -> None:
    """The share of an image is read off the first sample; pixels must have been blended with the same."""
    shares = []
    for step in range(8):
        mixed, samples = mixer(mixup=0.8)(VALUES, step)
        share = float(samples[0, 0])
        torch.testing.assert_close(mixed, share * VALUES + (1 - share) * VALUES.flip(0))
        torch.testing.assert_close(samples, share * EYE + (1 - share) * EYE.flip(0))
        shares.append(share)
    assert len(set(shares)) == 8 and 0 < min(shares) < max(shares) < 1


def test_cutmix_swaps_a_rectangle_and_shares_go_by_its_area() -> None:
    areas = set()
    for step in range(8):
        mixed, samples = mixer(cutmix=1.0)(VALUES, step)
        swapped = mixed == VALUES.flip(0)
        assert bool((swapped | (mixed == VALUES)).all()) and torch.equal(swapped[0], swapped[3])
        area = swapped[0, 0]
        rows, columns = area.any(dim=1), area.any(dim=0)
        assert torch.equal(area, torch.outer(rows, columns)), "a rectangle"
        share = 1 - float(area.float().mean())
        torch.testing.assert_close(samples, share * EYE + (1 - share) * EYE.flip(0))
        areas.add(int(area.sum()))
    assert len(areas) > 3


def test_labels_become_what_timm_makes_of_them() -> None:
    labels = torch.tensor([0, 1, 2, 1])
    both = mixer(mixup=0.8, cutmix=1.0)
    for step in range(6):
        mixed, samples = both(VALUES, step)
        with augment.global_numpy_seed(augment.derive_seed(5, "mix", step)):
            theirs = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=3)(VALUES.clone(), labels)
        assert torch.equal(mixed, theirs[0])
        torch.testing.assert_close(samples @ smoothed(labels, 3, 0.1), theirs[1])


def test_without_mixing_images_stay_and_labels_are_smoothed() -> None:
    mixed, samples = mixer()(VALUES[:3], 0)
    assert torch.equal(mixed, VALUES[:3]) and torch.equal(samples, torch.eye(3))
    want = torch.tensor([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]])
    torch.testing.assert_close(smoothed(torch.tensor([2, 0]), 3, 0.3), want)


def test_mixing_is_a_pure_function_of_seed_and_step_and_leaves_numpys_generator_alone() -> None:
    both = mixer(mixup=0.8, cutmix=1.0)
    np.random.seed(1)
    want = np.random.rand()
    np.random.seed(1)
    kept = VALUES.clone()
    first = [both(VALUES, step) for step in range(6)]
    assert np.random.rand() == want
    assert torch.equal(kept, VALUES), "the inputs are not changed in place"
    again = [both(VALUES, step) for step in range(6)]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert len({float(samples[0, 0]) for _, samples in first}) == 6
    kinds = {bool(((mixed == VALUES) | (mixed == VALUES.flip(0))).all()) for mixed, _ in first}
    assert kinds == {True, False}, "cutmix at some steps, mixup at others"
