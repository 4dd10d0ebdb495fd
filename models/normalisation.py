"""Whether images come into an encoder as they came in when its checkpoint was trained: no shape and no name in the file
tells. A `config.json` of timm's beside it does, timm does for the weights that it publishes, and where nobody does the
run says what it assumed. Pure: what lies beside the file was read before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from timm.models import get_pretrained_cfg, list_models

from models.config import ModelConfig, Normalisation, model_name, normalisation_settings, normalisation_words
from models.families import ModelError

CLOSE = 1e-3
"""By how much numbers may differ that mean the same, written with fewer digits: a quarter of a step of uint8."""


def told(config: ModelConfig, stated: Normalisation | None) -> str:
    """One line on how images are normalised for `model.weights`, and on whose word. `stated` is what lies beside it.

    Raises ModelError, which names the settings that fit, where that or timm's weights of the very tag are of another.
    """
    own, published = (config.mean, config.std), published_weights(config.name)
    says, remedy = "its config.json", ""
    if stated is None and "." in config.name and published:
        (stated,) = published.values()
        says, remedy = f"timm's {config.name}", ", or name the model without its tag for other weights"
    if stated is not None:
        if not _same(own, stated):
            raise ModelError(
                f"model.weights={config.weights} wants images of {normalisation_words(*stated)}, as {says} "
                f"says; the settings give it {normalisation_words(*own)}; {normalisation_settings(*stated)} fits"
                f"{remedy}"
            )
        return f"images are normalised with {normalisation_words(*own)}, as {says} says"
    return _assumed(own, published)


def published_weights(name: str) -> Mapping[str, Normalisation]:
    """tag -> normalisation of the weights that timm publishes under a model's name; only its tag's where it has one."""
    full = model_name(name)
    names = list_models(full if "." in full else f"{full}.*", pretrained=True)
    cards = {name.partition(".")[2]: get_pretrained_cfg(name) for name in names}
    return {tag: cast(Normalisation, (card.mean, card.std)) for tag, card in cards.items() if card}


def _assumed(own: Normalisation, published: Mapping[str, Normalisation]) -> str:
    """What is said where only timm's weights of the same name are known, which the file may be or not."""
    line = f"images are normalised with {normalisation_words(*own)}"
    others = {tag: one for tag, one in published.items() if not _same(own, one)}
    count = f"all {len(published)} of timm's weights of this name"
    if published and not others:
        return f"{line}, as {count}"
    line += ", which is assumed"
    if not others:
        return line
    if len(others) < len(published):
        count = f"{len(others)} of timm's {len(published)} weights of this name"
    tags = {one: [tag for tag in others if others[tag] == one] for one in others.values()}
    fitting = (f"{normalisation_settings(*one)} fits {_first(named)}" for one, named in tags.items())
    return f"{line}; {count} take others: {', '.join(fitting)}"


def _first(tags: list[str]) -> str:
    return tags[0] + (f" and {len(tags) - 1} more" if tags[1:] else "")


def _same(one: Normalisation, other: Normalisation) -> bool:
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    return all(abs(a - b) <= CLOSE for a, b in pairs)
