"""Near-duplicates by the Hamming distance of their signatures, without comparing every video with every other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

WORDS = 3
BITS = 64 * WORDS

PAIRS_AT_ONCE = 1 << 20


def near_duplicates(signatures: np.ndarray, most_bits: int) -> dict[int, tuple[int, int]]:
    """Finds each row that repeats an earlier one: row -> (the earlier row, bits in which they differ).

    A row is only held against rows that are kept themselves, so the first of a chain always stays. All rows within
    `most_bits` of a kept one are found: cut into `most_bits` + 1 bands, two such signatures share at least one.

    Args:
        signatures: uint64 (N, 3).
        most_bits: of 192.
    """
    unique, first, which = np.unique(signatures, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    # Rows that are the very same are settled without a comparison; among the others each one comes first once.
    repeats: dict[int, tuple[int, int]] = {}
    near: dict[int, list[tuple[int, int]]] = {}
    for a, b, distance in _close_pairs(unique, most_bits):
        early, late = sorted((int(first[a]), int(first[b])))
        near.setdefault(late, []).append((early, distance))
    for late in sorted(near):
        kept = [(distance, early) for early, distance in near[late] if early not in repeats]
        if kept:
            distance, early = min(kept)
            repeats[late] = (early, distance)
    for row in np.flatnonzero(first[which] != np.arange(len(signatures))).tolist():
        same = int(first[which[row]])
        early, distance = repeats.get(same, (same, 0))
        repeats[row] = (early, distance)
    return repeats


def _close_pairs(signatures: np.ndarray, most_bits: int) -> Iterator[tuple[int, int, int]]:
    """Each (a, b, distance) of different rows within `most_bits`, once or more."""
    bits = np.unpackbits(signatures.astype(">u8").view(np.uint8).reshape(len(signatures), -1), axis=1)
    for band in np.array_split(np.arange(BITS), most_bits + 1):
        packed = np.packbits(bits[:, band], axis=1)
        keys = np.ascontiguousarray(packed).view(np.dtype((np.void, packed.shape[1]))).reshape(-1)
        order = np.argsort(keys, kind="stable")
        borders = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
        starts, stops = np.append(0, borders), np.append(borders, len(order))
        shared = stops - starts > 1
        for start, stop in zip(starts[shared].tolist(), stops[shared].tolist(), strict=True):
            yield from _within(signatures, order[start:stop], most_bits)


def _within(signatures: np.ndarray, rows: np.ndarray, most_bits: int) -> Iterator[tuple[int, int, int]]:
    step = max(1, PAIRS_AT_ONCE // len(rows))
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        differing = signatures[some][:, None, :] ^ signatures[rows][None, :, :]
        distances = np.bitwise_count(differing).sum(axis=2)
        for a, b in np.argwhere(distances <= most_bits).tolist():
            if some[a] < rows[b]:
                yield int(some[a]), int(rows[b]), int(distances[a, b])
