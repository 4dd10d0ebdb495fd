"""Recipes: sensible, distinct, and with the numbers that others build on."""

from __future__ import annotations

import pytest

from pipeline.checks import check
from pipeline.config import ConfigError
from pipeline.reading import load_config, parse
from pipeline.recipes import RECIPES, adapt, original, recipe, sample, vit_b16


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_checked_named_and_documented(name: str) -> None:
    make = RECIPES[name]
    given = ["model.weights=vit.safetensors"] if name == "adapt" else []
    assert load_config(name, given) == (name, parse({"model.weights": "vit.safetensors"} if given else {}, make()))
    assert make.__name__ == name
    assert "Expected" in (make.__doc__ or "") and "Command: make" in (make.__doc__ or "")


def test_sample_numbers() -> None:
    config = sample()
    assert (config.model.name, config.model.num_tokens, config.model.patch_values) == ("vit_tiny", 196, 48)
    assert (config.mask.groups, config.mask.ratio, config.target.kind) == (4, 0.75, "pixels")
    assert (config.schedule.cuts, config.schedule.epochs) == ((0, 3, 6, 9), (2, 1, 1, 3))
    assert (config.data.source, config.cache.views, config.train.batch_size) == ("sample", 1, 64)


def test_vit_b16_has_tokens_of_196_by_768_and_is_short() -> None:
    config = vit_b16()
    assert (config.model.name, config.model.num_tokens, config.model.patch_values) == ("vit_base", 196, 768)
    assert (config.data.limit, config.train.max_steps, config.cache.shard_rows) == (64, 2, 16)
    assert config.data.limit >= config.train.batch_size


def test_original_is_full_mode_with_features_and_says_that_it_leaks() -> None:
    assert (original().mask.groups, original().target.kind) == (1, "features")
    assert "It leaks" in (original.__doc__ or "")
    assert original().schedule == sample().schedule


def test_adapt_needs_a_checkpoint_and_freezes_its_first_half() -> None:
    with pytest.raises(ConfigError, match=r"give a checkpoint with model.weights=<file>"):
        check(recipe("adapt"))
    config = parse({"model.weights": "vit.safetensors"}, adapt())
    check(config)
    assert (config.model.name, config.model.num_tokens, config.model.class_token) == ("vit_base", 196, True)
    assert (config.schedule.cuts, config.schedule.epochs) == ((0, 6), (0, 8))
    assert "not measured" in (adapt.__doc__ or "")
