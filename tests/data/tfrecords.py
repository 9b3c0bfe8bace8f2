"""TFRecord files of examples, written without TensorFlow."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from defi_platform.data.sources.rlds.tfrecord import masked_crc32c


def message(number: int, content: bytes) -> bytes:
    """One field of a protocol buffer."""
    size, digits = len(content), b""
    while size >= 0x80:
        digits += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + digits + bytes([size]) + content


def bytes_list(values: list[bytes]) -> bytes:
    return message(1, b"".join(message(1, value) for value in values))


def float_list(values: list[float]) -> bytes:
    return message(2, message(1, np.array(values, "<f4").tobytes()))


def int_list(values: list[int]) -> bytes:
    return message(3, message(1, bytes(values)))


def example(features: dict[str, bytes]) -> bytes:
    entries = (message(1, message(1, name.encode()) + message(2, value)) for name, value in features.items())
    return message(1, b"".join(entries))


def write_tfrecord(place: Path, records: list[bytes]) -> None:
    with place.open("wb") as file:
        for record in records:
            head = struct.pack("<Q", len(record))
            file.write(head + struct.pack("<I", masked_crc32c(head)))
            file.write(record + struct.pack("<I", masked_crc32c(record)))
