"""TFRecord files and the `tf.train.Example` messages in them, read without TensorFlow.

Framing: length uint64, masked CRC-32C of it uint32, data, masked CRC-32C of the data uint32; little-endian.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Container, Iterator
from typing import IO

import numpy as np
from crc32c import crc32c

HEAD = struct.Struct("<QI")
TAIL = struct.Struct("<I")

LONGEST_HEAD = 20
"""Bytes of a field's number and length, or of its number and value."""

LONGEST_NAME = 4096
"""Bytes of a feature's name."""

Value = list[memoryview] | np.ndarray
"""A feature: byte strings, float32 (n,) or int64 (n,)."""


class DamagedRecord(ValueError):
    """A record whose checksum, length or encoding is wrong."""


def masked_crc32c(data: bytes | memoryview) -> int:
    """CRC-32C of `data` in the rotated and offset form that TFRecord stores."""
    checksum = crc32c(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def record_spans(file: IO[bytes], size: int) -> Iterator[tuple[int, int]]:
    """Yields (offset, length) of the data of every record, in bytes; reads the headers only.

    Raises: DamagedRecord where a header is damaged or the file ends early; the records before it are good.
    """
    offset = 0
    while offset < size:
        file.seek(offset)
        head = file.read(HEAD.size)
        if len(head) < HEAD.size:
            raise DamagedRecord(f"the file ends inside a header at byte {offset}")
        length, checksum = HEAD.unpack(head)
        if masked_crc32c(head[:8]) != checksum:
            raise DamagedRecord(f"the header at byte {offset} does not match its checksum")
        start = offset + HEAD.size
        offset = start + length + TAIL.size
        if offset > size:
            raise DamagedRecord(f"the record at byte {start} needs {length} bytes, the file ends before")
        yield start, length


def read_record(file: IO[bytes], offset: int, length: int, verify: bool = True) -> bytes:
    """Reads the data of one record.

    Args:
        file: a TFRecord file.
        offset: of the data, in bytes.
        length: of the data, in bytes.
        verify: compares the data with its checksum.

    Raises: DamagedRecord when it is cut short or does not match.
    """
    file.seek(offset)
    data = file.read(length + TAIL.size)
    if len(data) < length + TAIL.size:
        raise DamagedRecord(f"the record at byte {offset} is cut short")
    if verify and masked_crc32c(memoryview(data)[:length]) != TAIL.unpack(data[length:])[0]:
        raise DamagedRecord(f"the record at byte {offset} does not match its checksum")
    return data[:length]


def read_features(
    file: IO[bytes], offset: int, length: int, wanted: Container[str], most: int = sys.maxsize
) -> dict[str, Value]:
    """Reads the `wanted` features of the `tf.train.Example` in one record; the others are stepped over, not read.

    Args:
        file: a TFRecord file.
        offset: of the record's data, in bytes.
        length: of the record's data, in bytes.
        wanted: names of features; those that the record lacks are absent from the result.
        most: bytes of a feature that is read.

    Raises: DamagedRecord for a wanted feature that is larger, and when the way to them is damaged; what is stepped over may be, too.
    """
    features: dict[str, Value] = {}
    try:
        for number, *inside in _spans(file, offset, offset + length):
            if number != 1:
                continue
            for _, *entry in _spans(file, *inside):
                parts = {number: (start, stop) for number, start, stop in _spans(file, *entry)}
                if parts[1][1] - parts[1][0] > LONGEST_NAME:
                    raise ValueError(f"a feature whose name has {parts[1][1] - parts[1][0]:,} bytes")
                name = _content(file, *parts[1]).decode()
                if name in wanted:
                    start, stop = parts.get(2, (0, 0))
                    if stop - start > most:
                        raise ValueError(f"{name} has {stop - start:,} bytes")
                    value = _content(file, start, stop)
                    features[name] = _value(memoryview(value))
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise DamagedRecord(f"not a tf.train.Example: {error}") from error
    return features


def parse_example(record: bytes) -> dict[str, Value]:
    """Parses the features of a `tf.train.Example`, by name. Raises: DamagedRecord."""
    features: dict[str, Value] = {}
    try:
        for number, features_message in _fields(memoryview(record)):
            if number != 1:
                continue
            for _, entry in _fields(features_message):
                parts = dict(_fields(entry))
                features[bytes(parts[1]).decode()] = _value(parts.get(2, memoryview(b"")))
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise DamagedRecord(f"not a tf.train.Example: {error}") from error
    return features


def _value(feature: memoryview) -> Value:
    for number, content in _fields(feature):
        values = [value for field, value in _fields(content) if field == 1]
        if number == 1:
            return values
        if number == 2:  # packed, or one by one
            return np.frombuffer(b"".join(values), "<f4")
        if number == 3:
            return np.array([v for packed in values for v in _varints(packed)], np.int64)
    return []


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _varints(data: memoryview) -> Iterator[int]:
    position = 0
    while position < len(data):
        value, position = _varint(data, position)
        yield value - (1 << 64) if value >= 1 << 63 else value


def _spans(file: IO[bytes], position: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """`_fields` of the bytes from `position` to `stop` - 1 of a file: (field number, start and end of the content)."""
    while position < stop:
        file.seek(position)
        head = memoryview(file.read(min(LONGEST_HEAD, stop - position)))
        tag, start = _varint(head, 0)
        kind, end = tag & 7, start
        if kind == 0:
            _, end = _varint(head, start)
        elif kind == 2:
            size, start = _varint(head, start)
            end = start + size
        elif kind in (1, 5):
            end = start + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"wire type {kind}")
        if position + end > stop:
            raise ValueError("a field reaches past the end")
        yield tag >> 3, position + start, position + end
        position += end


def _content(file: IO[bytes], start: int, stop: int) -> bytes:
    file.seek(start)
    return file.read(stop - start)


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """(field number, content) of a protocol buffer message; a varint's content is its own bytes."""
    position = 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind, start = tag & 7, position
        if kind == 0:
            _, position = _varint(data, position)
        elif kind == 1:
            position += 8
        elif kind == 2:
            length, start = _varint(data, position)
            position = start + length
        elif kind == 5:
            position += 4
        else:
            raise ValueError(f"wire type {kind}")
        if position > len(data):
            raise ValueError("a field reaches past the end")
        yield tag >> 3, data[start:position]
