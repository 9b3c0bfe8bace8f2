"""The split into training and validation: a hash of the group decides, so what belongs together stays together.

The group is what a source says belongs together (CALVIN's segments that share frames), else the episode with all its
cameras, else the video by itself. Groups that hold copies of one video are one.
"""

from __future__ import annotations

import hashlib

import numpy as np

TRAIN, VALIDATION = "train", "validation"


def hash_position(key: str) -> int:
    """Position of a group among all there could be: 0 to 2**64 - 1."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")


def joined(positions: np.ndarray, contents: np.ndarray) -> np.ndarray:
    """Gives groups that have copies of one video, also through others, one position.

    Args:
        positions: uint64 (videos,), the `hash_position` of each one's group.
        contents: uint64 (videos,), equal for copies; 0: not known.

    Returns: uint64 (videos,); groups without copies keep their position.
    """
    known = np.flatnonzero(contents)
    if not len(known):
        return positions
    groups, group = np.unique(positions, return_inverse=True)
    copies, copy = np.unique(contents[known], return_inverse=True)
    group, copy = group.reshape(-1), copy.reshape(-1)
    # The smallest position spreads from group to copies and back until all that hang together have it.
    label, before = groups.copy(), np.empty(0, np.uint64)
    while not np.array_equal(label, before):
        before = label.copy()
        lowest = np.full(len(copies), np.iinfo(np.uint64).max, np.uint64)
        np.minimum.at(lowest, copy, label[group[known]])
        np.minimum.at(label, group[known], lowest[copy])
    # The smallest of many is small, which would hold out too often.
    ends, end = np.unique(label, return_inverse=True)
    for number in np.unique(end[label != groups]).tolist():
        ends[number] = hash_position(f"copies of {ends[number]}")
    return np.asarray(ends[end.reshape(-1)][group])


def held_out(positions: np.ndarray, holdout: float) -> np.ndarray:
    """Draws the videos for validation.

    Args:
        positions: uint64 (videos,), the `hash_position` of each one's group.
        holdout: share of validation in [0, 1]. With a share between, both splits get a group as soon as
            there are two, however few there are.
    """
    held = positions / 2.0**64 < holdout
    if 0 < holdout < 1 and len(positions):
        first, last = positions.min(), positions.max()
        if first != last:
            held[positions == first] = True
            held[positions == last] = False
    return np.asarray(held)


def is_split(name: str) -> bool:
    """Returns whether `name` is a split there is."""
    return name in (TRAIN, VALIDATION)


def mask(codes: np.ndarray, names: list[str], split: str) -> np.ndarray:
    """Selects the rows of a dictionary-encoded split column that belong to `split`.

    Args:
        codes: integers (rows,).
        names: splits by their code.
        split: one of them, or another.

    Returns: bool (rows,).
    """
    return codes == names.index(split) if split in names else np.zeros(len(codes), bool)
