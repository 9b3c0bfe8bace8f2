"""Splits that a corpus names itself, by its folders or lists: they are kept where it has both."""

from __future__ import annotations

from collections.abc import Iterable

from defi_platform.data.manifest.split import TRAIN, VALIDATION

TRAIN_NAMES = frozenset({"train", "training"})
HELD_OUT_NAMES = frozenset({"val", "valid", "validation", "test", "testing", "eval", "dev"})
"""What is not for training, whatever else it is for."""


def named_split(words: Iterable[str]) -> str:
    """The split that some words in small letters name; "" for none."""
    found = set(words)
    if found & HELD_OUT_NAMES:
        return VALIDATION
    return TRAIN if found & TRAIN_NAMES else ""


def own_splits(splits: Iterable[str]) -> bool:
    """True when a corpus has both splits: where it names one alone, the configured holdout decides."""
    return {TRAIN, VALIDATION} <= set(splits)
