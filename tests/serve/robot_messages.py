"""What a robot sends to the nano policy."""

from __future__ import annotations

from typing import Any

import numpy as np


def observation(number: int, **changes: Any) -> dict[str, Any]:
    """A random observation for the nano policy; the same one for the same number."""
    draws = np.random.default_rng(number)
    message = {
        "observation/images/front": draws.integers(0, 256, (64, 64, 3), dtype=np.uint8),
        "observation/state": draws.normal(size=4).astype(np.float32),
        "prompt": f"open the {'big ' * (number % 3)}drawer",
        "seed": number,
    }
    return message | changes
