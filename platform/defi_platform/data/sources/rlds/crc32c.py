"""CRC-32C (Castagnoli) with numpy: TFRecord protects its lengths and its data with it.

A checksum runs byte by byte; many equal slices of the data are run side by side instead, then joined by the
rule that a CRC is linear (appending n zero bytes is a fixed matrix over GF(2)).
"""

from __future__ import annotations

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78

SLICE = 64
"""Bytes of a slice, about; the slices run side by side."""


@functools.cache
def _table() -> np.ndarray:
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = np.where(values & 1, (values >> 1) ^ np.uint32(POLYNOMIAL), values >> 1)
    return values


@functools.lru_cache(maxsize=64)
def _zeros(count: int) -> np.ndarray:
    """(4, 256) uint32: what `count` zero bytes do to each byte of a register, to be joined by xor."""
    register = np.left_shift(
        np.arange(256, dtype=np.uint32)[None, :], np.uint32(8) * np.arange(4, dtype=np.uint32)[:, None]
    )
    step, table = register, _table()
    # Square and multiply: `power` appends 2**i zero bytes.
    power = table[step & 0xFF] ^ (step >> np.uint32(8))
    result = register
    while count:
        if count & 1:
            result = _applied(power, result)
        power = _applied(power, power)
        count >>= 1
    return result


def _applied(matrix: np.ndarray, register: np.ndarray) -> np.ndarray:
    return np.asarray(
        matrix[0][register & 0xFF]
        ^ matrix[1][(register >> np.uint32(8)) & 0xFF]
        ^ matrix[2][(register >> np.uint32(16)) & 0xFF]
        ^ matrix[3][register >> np.uint32(24)],
        np.uint32,
    )


def crc32c(data: bytes | memoryview) -> int:
    """The checksum of `data`."""
    values = np.frombuffer(data, np.uint8)
    table = _table()
    lanes = 1 << max(0, (len(values) // SLICE).bit_length() - 1)
    length = len(values) // lanes
    state = np.zeros(lanes, np.uint32)
    columns = np.ascontiguousarray(values[: length * lanes].reshape(lanes, length).T)
    for column in columns:
        state = table[(state ^ column) & 0xFF] ^ (state >> np.uint32(8))
    covered = length
    while len(state) > 1:  # neighbours are joined, then the joined ones
        state = _applied(_zeros(covered), state[0::2]) ^ state[1::2]
        covered *= 2
    register = _applied(_zeros(length * lanes), np.array([0xFFFFFFFF], np.uint32)) ^ state
    for byte in values[length * lanes :]:
        register = table[(register ^ byte) & 0xFF] ^ (register >> np.uint32(8))
    return int(register[0]) ^ 0xFFFFFFFF


def masked(checksum: int) -> int:
    """The rotated and offset form that TFRecord stores."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF
