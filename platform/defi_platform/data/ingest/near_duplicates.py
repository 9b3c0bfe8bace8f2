"""Near-duplicates by the Hamming distance of their signatures, without comparing every video with every other."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

WORDS = 3
BITS = 64 * WORDS

FULL_BUCKET = 64
"""Rows that share a band from which on further bands keep them apart."""

NARROWEST_BAND = 3
"""Bits of a band; narrower ones would tell too few rows apart for what they cost."""

MOST_SEEN = 2_000_000
"""Rows that are looked at in all, besides `SEEN_PER_BAND` for each row and band; then only the `LATEST` per band are."""

MOST_ENTRIES = 1_000_000
"""Entries of kept rows in buckets, besides `ENTRIES_PER_BAND` for each row and band."""

SEEN_PER_BAND, ENTRIES_PER_BAND = 40, 3

LATEST = 32

Segment = tuple[int, int]
"""A run of bits of a signature: number of the first, and how many."""


def near_duplicates(
    signatures: np.ndarray, most_bits: int, partly: list[int] | None = None
) -> dict[int, tuple[int, int]]:
    """Finds each row that repeats an earlier one: row -> (the earlier row, bits in which they differ).

    A row is only held against rows that are kept themselves, so the first of a chain always stays, and a million
    videos that are nearly the same are compared with one. All rows within `most_bits` of a kept one are found: of
    `most_bits` + 1 bands, two such signatures share at least one. Where very many are nearly that near and not quite,
    time and memory end that: the rows after it are held against the latest kept ones of their bands.

    Args:
        signatures: uint64 (N, 3).
        most_bits: of 192.
        partly: takes the rows that were not held against all.
    """
    unique, first, which = np.unique(signatures, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    # Rows that are the very same are settled without a comparison; of the others each one comes once.
    repeats: dict[int, tuple[int, int]] = {}
    packed, bands = _spread(unique, most_bits + 1), _bands([(0, BITS)], most_bits + 1)
    groups = np.stack([_shared_groups(packed, band) for band in bands])
    others = np.flatnonzero((groups >= 0).any(axis=0))
    others = others[np.argsort(first[others])]
    # In order of the corpus, so that an earlier row has a lower number.
    rows, found = first[others].tolist(), groups[:, others].T.tolist()
    values = [int.from_bytes(row.tobytes(), "big") for row in packed[others]]
    del unique, packed, groups
    kept: dict[tuple[int, int], _Bucket | list[int]] = {}
    latest: dict[tuple[int, int], deque[int]] = {}
    work = _Work(len(signatures) * len(bands))
    for number, value in enumerate(values):
        keys = [(band, group) for band, group in enumerate(found[number]) if group >= 0]
        full = work.full()
        known: Mapping[tuple[int, int], Any] = latest if full else kept
        near = [_nearest(bucket, values, value, work) for key in keys if (bucket := known.get(key))]
        if full and partly is not None:
            partly.append(rows[number])
        distance, early = min(near, default=NOTHING)
        if distance <= most_bits:
            repeats[rows[number]] = (rows[early], distance)
            continue
        for key in keys:
            latest.setdefault(key, deque(maxlen=LATEST)).append(number)
            if not full:
                free = _without([(0, BITS)], bands[key[0]])
                kept[key] = _added(kept.get(key), values, number, free, most_bits + 1, work)
        if full:
            kept.clear()
    for row in np.flatnonzero(first[which] != np.arange(len(signatures))).tolist():
        same = int(first[which[row]])
        early_row, distance = repeats.get(same, (same, 0))
        repeats[row] = (early_row, distance)
    return repeats


NOTHING = (BITS + 1, -1)


class _Work:
    """A count of the work done, held against its limits. Args: bands: of all rows."""

    def __init__(self, bands: int) -> None:
        self.seen = self.entries = 0
        self._most_seen = MOST_SEEN + SEEN_PER_BAND * bands
        self._most_entries = MOST_ENTRIES + ENTRIES_PER_BAND * bands

    def full(self) -> bool:
        """Whether it is enough."""
        return self.seen > self._most_seen or self.entries > self._most_entries


def _nearest(
    bucket: _Bucket | list[int] | deque[int], values: list[int], value: int, work: _Work
) -> tuple[int, int]:
    """(distance, number) of the row in a bucket that differs least from `value`."""
    if not isinstance(bucket, _Bucket):
        work.seen += len(bucket)
        return min(((values[number] ^ value).bit_count(), number) for number in bucket)
    found = NOTHING
    work.seen += len(bucket.bands)
    for band in bucket.bands:
        child = bucket.children.get((band, _key(value, band)))
        if child is not None:
            found = min(found, _nearest(child, values, value, work))
    return found


def _added(
    bucket: _Bucket | list[int] | None,
    values: list[int],
    number: int,
    free: list[Segment],
    num_bands: int,
    work: _Work,
) -> _Bucket | list[int]:
    """The bucket with one row more: a list of numbers, or a `_Bucket` once there are many and bits left to tell apart."""
    if isinstance(bucket, _Bucket):
        bucket.add(values, number, work)
        return bucket
    work.entries += 1
    if bucket is None:
        return [number]
    bucket.append(number)
    if len(bucket) != FULL_BUCKET or not (bands := _bands(free, num_bands)):
        return bucket
    split = _Bucket(bands, free)
    for one in bucket:
        split.add(values, one, work)
    return split


class _Bucket:
    """Kept rows that share a band, in buckets by further bands of the bits in which they may differ."""

    __slots__ = ("bands", "children", "free")

    def __init__(self, bands: list[Segment], free: list[Segment]) -> None:
        self.bands, self.free = bands, free
        self.children: dict[tuple[Segment, int], _Bucket | list[int]] = {}

    def add(self, values: list[int], number: int, work: _Work) -> None:
        """Takes row `number` of `values`."""
        for band in self.bands:
            key = (band, _key(values[number], band))
            left = _without(self.free, band)
            self.children[key] = _added(self.children.get(key), values, number, left, len(self.bands), work)


_FOUND: dict[tuple[tuple[Segment, ...], int], list[Segment]] = {}


def _bands(free: list[Segment], count: int) -> list[Segment]:
    """`count` bands of equal width that share no bit, as wide as there is room for; [] where they would be narrow."""
    key = (tuple(free), count)
    if key not in _FOUND:
        top = free == [(0, BITS)]
        width = BITS // count
        while width and sum(length // width for _, length in free) < count:
            width -= 1
        found = [
            (start + number * width, width)
            for start, length in free
            for number in range(length // width if width else 0)
        ][:count]
        if top:  # the bits that are left over
            found[-1] = (found[-1][0], BITS - found[-1][0])
        _FOUND[key] = found if top or width >= NARROWEST_BAND else []
    return _FOUND[key]


def _without(free: list[Segment], band: Segment) -> list[Segment]:
    start, width = band
    left: list[Segment] = []
    for first, length in free:
        if first <= start < first + length:
            left += [(first, start - first), (start + width, first + length - start - width)]
        else:
            left.append((first, length))
    return [segment for segment in left if segment[1] > 0]


def _key(value: int, band: Segment) -> int:
    """The bits of a band; bit 0 is the highest of the first word."""
    start, width = band
    return (value >> (BITS - start - width)) & ((1 << width) - 1)


def _spread(signatures: np.ndarray, count: int) -> np.ndarray:
    """uint8 (N, 24): the bits of all rows in another order, by which `count` bands tell rows apart about equally well.

    Bits that nearly all videos share, such as those of a title at their start, would fill a band and make it useless.
    """
    bits = np.unpackbits(signatures.astype(">u8").view(np.uint8).reshape(len(signatures), -1), axis=1)
    evenness = np.abs(bits.mean(axis=0) - 0.5) if len(bits) else np.zeros(BITS)
    order = np.argsort(evenness, kind="stable")
    return np.packbits(bits[:, np.concatenate([order[band::count] for band in range(count)])], axis=1)


def _shared_groups(packed: np.ndarray, band: Segment) -> np.ndarray:
    """int64 (N,): rows with equal bits in a band have equal numbers; -1 where no other row has the same."""
    start, stop = band[0], band[0] + band[1]
    low, high = start // 8, -(-stop // 8)
    content = packed[:, low:high].copy()
    content[:, 0] &= 0xFF >> (start - 8 * low)
    content[:, -1] &= 0xFF << (8 * high - stop) & 0xFF
    keys = np.ascontiguousarray(content).view(np.dtype((np.void, high - low))).reshape(-1)
    order = np.argsort(keys, kind="stable")
    new = np.append(True, keys[order][1:] != keys[order][:-1])[: len(keys)]
    number = np.cumsum(new) - 1
    alone = np.bincount(number, minlength=1)[number] == 1
    groups = np.empty(len(packed), np.int64)
    groups[order] = np.where(alone, -1, number)
    return groups
