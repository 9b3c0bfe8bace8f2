"""Which videos are held out for validation: a hash of the episode decides, so all its cameras stay together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

TRAIN, VALIDATION = "train", "validation"


def assign(keys: Sequence[str], holdout: float) -> list[str]:
    """The split of each video.

    Args:
        keys: per video the key of its episode (or its own id where it stands alone).
        holdout: share of validation in [0, 1]. With a share between, both splits get an episode as soon as
            there are two, however few there are.
    """
    unique = sorted(set(keys))
    places = {key: int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64 for key in unique}
    held = {key for key in unique if places[key] < holdout}
    if 0 < holdout < 1 and len(unique) > 1:
        by_place = sorted(unique, key=places.__getitem__)
        held = (held | {by_place[0]}) - {by_place[-1]}
    return [VALIDATION if key in held else TRAIN for key in keys]


def is_split(name: str) -> bool:
    """Whether `name` is a split there is."""
    return name in (TRAIN, VALIDATION)


def mask(codes: np.ndarray, names: list[str], split: str) -> np.ndarray:
    """Which rows of a dictionary-encoded split column belong to `split`."""
    return codes == names.index(split) if split in names else np.zeros(len(codes), bool)
