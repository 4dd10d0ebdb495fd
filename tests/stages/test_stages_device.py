"""How many samples pass blocks at once."""

from __future__ import annotations

import pytest

from stages.device import best_batch


@pytest.mark.parametrize(
    ("device", "tokens", "width", "most", "want"),
    [
        ("cpu", 196, 192, 64, 33),
        ("cpu", 196, 768, 64, 8),
        ("cpu", 64, 192, 64, 64),
        ("cpu", 4096, 4096, 64, 1),
        ("cuda", 196, 768, 64, 64),
    ],
)
def test_a_cpu_takes_as_many_as_stay_in_memory_that_is_there(
    device: str, tokens: int, width: int, most: int, want: int
) -> None:
    """The hidden layer of a block, four times the width, in float32 and at most 20 MB of it."""
    assert best_batch(device, tokens, width, most) == want
    assert device != "cpu" or want == 1 or want * tokens * 4 * width * 4 <= 20_000_000
