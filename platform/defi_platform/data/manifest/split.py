"""Which videos are held out for validation: a hash of the episode decides, so all its cameras stay together."""

from __future__ import annotations

import hashlib

import numpy as np

TRAIN, VALIDATION = "train", "validation"


def place(key: str) -> int:
    """Where an episode (or a video that stands alone) lies among all there could be: 0 to 2**64 - 1."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def held_out(places: np.ndarray, holdout: float) -> np.ndarray:
    """Which videos are for validation.

    Args:
        places: uint64 (videos,), the `place` of each one's episode.
        holdout: share of validation in [0, 1]. With a share between, both splits get an episode as soon as
            there are two, however few there are.
    """
    held = places / 2.0**64 < holdout
    if 0 < holdout < 1 and len(places):
        first, last = places.min(), places.max()
        if first != last:
            held[places == first] = True
            held[places == last] = False
    return np.asarray(held)


def is_split(name: str) -> bool:
    """Whether `name` is a split there is."""
    return name in (TRAIN, VALIDATION)


def mask(codes: np.ndarray, names: list[str], split: str) -> np.ndarray:
    """Which rows of a dictionary-encoded split column belong to `split`."""
    return codes == names.index(split) if split in names else np.zeros(len(codes), bool)
