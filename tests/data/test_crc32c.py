"""The checksum of TFRecords."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from defi_platform.data.sources.rlds.crc32c import crc32c, masked


@pytest.mark.parametrize(
    ("data", "checksum"),
    [(b"", 0), (b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43)],
)
def test_crc32c_agrees_with_published_values(data: bytes, checksum: int) -> None:
    assert crc32c(data) == checksum


def test_crc32c_of_long_data_agrees_with_the_checksums_in_a_real_file(shared_data: Path) -> None:
    place = shared_data / "rlds/bridge_dataset/1.0.0/bridge_dataset-train.tfrecord-00000-of-00001"
    content = place.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    assert struct.unpack_from("<I", content, 12 + length)[0] == masked(crc32c(content[12 : 12 + length]))
