"""Framing and checksums of TFRecord files."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from defi_platform.data.sources.rlds.tfrecord import masked_crc32c, read_record, record_spans


def unmasked(stored: int) -> int:
    """The checksum behind its stored form."""
    rotated = (stored - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "checksum"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
)
def test_the_checksum_agrees_with_published_values(data: bytes, checksum: int) -> None:
    assert unmasked(masked_crc32c(data)) == checksum


def test_the_checksum_of_long_data_agrees_with_that_in_a_real_file(shared_data: Path) -> None:
    path = shared_data / "rlds/bridge_dataset/1.0.0/bridge_dataset-train.tfrecord-00000-of-00001"
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    assert struct.unpack_from("<I", content, 12 + length)[0] == masked_crc32c(content[12 : 12 + length])
    with path.open("rb") as file:
        spans = list(record_spans(file, len(content)))
        assert spans[0] == (12, length)
        assert [len(read_record(file, *span, verify=True)) for span in spans] == [size for _, size in spans]
