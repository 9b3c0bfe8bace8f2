"""The wire format, checked against openpi's own client library."""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from openpi_client import msgpack_numpy

from defi_platform.serve.protocols import openpi

PLAIN_DTYPES = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.unsigned_integer_dtypes(endianness="?"),
    hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64)),
)
ARRAYS = hnp.arrays(PLAIN_DTYPES, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))


@given(ARRAYS)
def test_what_openpi_packs_we_read_and_the_other_way_round(array: np.ndarray) -> None:
    message = {"observation/state": array, "nested": {"list": [array, "text", 3, None]}, "prompt": "öffne"}
    for pack, unpack in ((msgpack_numpy.packb, openpi.unpack), (openpi.pack, msgpack_numpy.unpackb)):
        read = unpack(pack(message))
        for got in (read["observation/state"], read["nested"]["list"][0]):
            assert got.dtype == array.dtype and got.shape == array.shape
            assert got.tobytes() == array.tobytes()
        assert read["nested"]["list"][1:] == ["text", 3, None] and read["prompt"] == "öffne"


def test_both_sides_write_the_same_bytes() -> None:
    message = {"a": np.arange(6, dtype=">i2").reshape(2, 3)[:, ::2], "b": np.float32(1.5), "c": b"raw"}
    assert openpi.pack(message) == msgpack_numpy.packb(message)


def test_numpy_scalars_keep_their_dtype() -> None:
    read = openpi.unpack(openpi.pack({"seed": np.int64(7), "gripper": np.float32(0.5)}))
    assert read["seed"].dtype == np.int64 and read["gripper"].dtype == np.float32


@pytest.mark.parametrize("array", [np.array([object()]), np.array([1j]), np.zeros(2, "f4,f4")])
def test_object_complex_and_structured_arrays_are_not_sent(array: np.ndarray) -> None:
    with pytest.raises(openpi.ProtocolError, match="dtype"):
        openpi.pack({"a": array})


def test_a_value_msgpack_does_not_know_is_named() -> None:
    with pytest.raises(openpi.ProtocolError, match="no form for a set"):
        openpi.pack({"a": {1, 2}})


def array_message(data: object = b"\0" * 8, dtype: object = "<f4", shape: object = (2,)) -> bytes:
    return msgpack.packb({"a": {b"__ndarray__": True, b"data": data, b"dtype": dtype, b"shape": shape}})


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (array_message(dtype="|O"), "not accepted"),
        (array_message(dtype="f4,O"), "not accepted"),
        (array_message(dtype="(3,)f4"), "not accepted"),
        (array_message(dtype="S0", data=b""), "not accepted"),
        (array_message(dtype="no such"), "no dtype"),
        (array_message(dtype=4), "expected a string"),
        (array_message(shape=(3,)), "takes 12 bytes"),
        (array_message(shape=(-2,)), "list of sizes"),
        (array_message(shape=(2**62, 2**62), data=b""), "takes"),
        (array_message(shape=[1] * 40, data=b"1234"), "dimensions"),
        (array_message(shape=None), "list of sizes"),
        (array_message(data="text"), "expected bytes"),
        (msgpack.packb({"a": {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}}), "bad NumPy scalar"),
        (msgpack.packb({"a": 1})[:-1], "not msgpack"),
        (msgpack.packb({"a": 1}) + b"more", "not msgpack"),
        (b"", "not msgpack"),
        (b"\x81" * 5000, "16 deep"),
        (b"hello", "not msgpack"),
    ],
)
def test_damaged_and_hostile_messages_are_protocol_errors(data: bytes, complaint: str) -> None:
    with pytest.raises(openpi.ProtocolError, match=complaint):
        openpi.unpack(data)


@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused_but_nothing_else(data: bytes) -> None:
    try:
        openpi.unpack(data)
    except openpi.ProtocolError as error:
        assert str(error)
