"""The suffixes of tensors' names are enforced in these tests; without that, a wrong suffix would go unnoticed."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import TypeCheckError

from models.masking import GroupMask, Mask, take_tokens
from models.mim import MaskedModel


def test_a_tensor_with_other_axes_is_refused() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    assert take_tokens(torch.zeros(2, 5, 3), ids).shape == (2, 4, 3)
    with pytest.raises(TypeCheckError, match="tokens_BLD"):
        take_tokens(torch.zeros(2, 5), ids)
    with pytest.raises(TypeCheckError, match="ids_BK"):
        take_tokens(torch.zeros(3, 5, 3), ids)


def test_methods_and_dataclasses_are_checked_too() -> None:
    mask = Mask(*(torch.zeros(2, 4),) * 4)
    with pytest.raises(TypeCheckError, match="scored_BL"):
        GroupMask(torch.zeros(2, 4), mask, torch.zeros(3, 4))
    with pytest.raises(TypeCheckError, match="images_BCHW"):
        MaskedModel.from_images(None, torch.zeros(2, 16, 3), torch.zeros(2, 16), 4)  # type: ignore[arg-type]
