"""Random order without memory: keyed permutations and keyed numbers, a function of their key alone."""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS, ROUNDS_OF_NARROW = 4, 6
"""Of the Feistel network; where its halves have fewer than WIDE bits, four leave neighbours too often as neighbours."""

WIDE = 12

SHUFFLED = 256
"""Largest range that is shuffled in memory, one sort of so many numbers per key."""

SHUFFLED_VALUES = 1 << 18
"""Numbers that are sorted at once."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key_of(*parts: object) -> int:
    """Makes a 64-bit key from anything with a stable repr."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big")


def mixed(values: np.ndarray, keys: np.ndarray | int) -> np.ndarray:
    """Mixes (value, key) into a uint64; the finaliser of splitmix64."""
    with np.errstate(over="ignore"):
        x = np.asarray(values, np.uint64) * _GOLDEN + np.asarray(keys, np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)), np.uint64)


def uniform(values: np.ndarray, key: int) -> np.ndarray:
    """Draws a float64 in [0, 1) for each value."""
    return np.asarray((mixed(values, key) >> np.uint64(11)).astype(np.float64) / 2**53)


def permuted(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Maps each position by a permutation of range(size), one permutation per key.

    Args:
        positions: int (N,) in [0, size).
        size: of the range.
        keys: uint64 (N,), or one for all.

    Returns: int64 (N,).
    """
    x = np.asarray(positions, np.int64)
    keys = np.broadcast_to(np.asarray(keys, np.uint64), x.shape)
    return _shuffled(x, size, keys) if size <= SHUFFLED else _feistel(x, size, keys)


def _shuffled(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A shuffle in memory, whose permutations are all equally likely; a Feistel network is not that even when small."""
    result = np.empty(len(positions), np.int64)
    different, which = np.unique(keys, return_inverse=True)
    values = np.arange(size, dtype=np.uint64)
    at_once = max(1, SHUFFLED_VALUES // size)
    for start in range(0, len(different), at_once):
        some = different[start : start + at_once]
        orders = np.argsort(mixed(values[None, :], some[:, None]), axis=1)
        here = np.flatnonzero((which >= start) & (which < start + at_once))
        result[here] = orders[which[here] - start, positions[here]]
    return result


def _feistel(positions: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A Feistel network over the smallest power of two that holds `size`.

    Results past the end are fed back (cycle walking) until they fall inside, which keeps it a permutation.
    """
    bits = (size - 1).bit_length()
    low = np.uint64(bits - bits // 2)
    # The halves change places every round, so their widths do too.
    masks = [np.uint64((1 << width) - 1) for width in (bits // 2, int(low))]
    rounds = ROUNDS if bits // 2 >= WIDE else ROUNDS_OF_NARROW
    x = positions.astype(np.uint64)
    todo = np.arange(len(x))
    while len(todo):
        left, right = x[todo] >> low, x[todo] & masks[1]
        for number in range(rounds):
            mixed_right = mixed(right + np.uint64(number << 48), keys[todo])
            left, right = right, left ^ (mixed_right & masks[number % 2])
        x[todo] = (left << low) | right
        todo = todo[x[todo] >= size]
    return x.astype(np.int64)
