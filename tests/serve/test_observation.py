"""An observation is checked against the policy before it reaches a replica."""

from __future__ import annotations

import io
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from defi_platform.serve import encoded_image
from defi_platform.serve.observation import (
    ANY_CAMERA,
    PolicySpec,
    read_observation,
)
from defi_platform.serve.observation_keys import ObservationKeys
from defi_platform.serve.refusals import ObservationError

SPEC = PolicySpec(
    policy="runs/policy",
    preset="nano",
    cameras=("front", "wrist"),
    image_size=(32, 48),
    state_dim=4,
    action_dim=4,
    chunk=8,
)


def observation(**changes: Any) -> dict[str, Any]:
    message: dict[str, Any] = {
        "observation/images/front": np.full((32, 48, 3), 10, np.uint8),
        "observation/images/wrist": np.full((64, 96, 3), 20, np.uint8),
        "observation/state": np.arange(4, dtype=np.float64),
        "prompt": "open the door",
        "seed": 3,
    }
    message.update({key.replace("__", "/"): value for key, value in changes.items()})
    return {key: value for key, value in message.items() if value is not None}


def test_images_of_any_size_are_stacked_at_the_policys_size_in_its_camera_order() -> None:
    read = read_observation(observation(), SPEC)
    assert read.images.shape == (2, 32, 48, 3) and read.images.dtype == np.uint8
    assert (read.images[0] == 10).all() and (read.images[1] == 20).all()
    assert read.state is not None and read.state.dtype == np.float32 and read.state.tolist() == [0, 1, 2, 3]
    assert (read.prompt, read.seed, read.ignored) == ("open the door", 3, ())


def test_a_policy_with_one_unnamed_camera_takes_whichever_single_image_comes() -> None:
    spec = replace(SPEC, cameras=(ANY_CAMERA,))
    message = observation()
    with pytest.raises(ObservationError, match=r"one camera; expected one key .* got .*front, .*wrist"):
        read_observation(message, spec)
    del message["observation/images/wrist"]
    assert (read_observation(message, spec).images == 10).all()


def test_an_unnamed_camera_is_neither_the_state_nor_the_prompt() -> None:
    keys = ObservationKeys(images="observation/{camera}", prompt="observation/task")
    message = {"picture": b"", "state": 0, "task": "go"}
    assert keys.images_in({f"observation/{key}": value for key, value in message.items()}) == [
        "observation/picture"
    ]
    assert keys.images_in({"observation": message}) == ["observation/picture"]


def chunk(name: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


PNG, JPEG = (encoded(Image.new("RGB", (8, 8)), kind) for kind in ("PNG", "JPEG"))


def ihdr_sum() -> bytes:
    return struct.pack(">I", zlib.crc32(PNG[12:16] + 2 * struct.pack(">I", 60_000) + PNG[24:29]))


def many_scans() -> bytes:
    """A picture of 16 million pixels whose last pass over them comes a thousand times more, in 33 bytes each."""
    once = encoded(Image.new("RGB", (4096, 4096)), "JPEG", progressive=True)
    scan = once[once.rfind(b"\xff\xda") : -2]
    return once[:-2] + 1000 * scan + once[-2:]


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: PNG[:33] + chunk(b"aaAa") * 100_000 + PNG[33:], "too many parts"),
        (lambda: PNG[:33] + chunk(b"IDAT") * 100_000 + PNG[33:], "too many parts"),
        (lambda: JPEG[:2] + b"\xff\xfe\0\2" * 100_000 + JPEG[2:], "too many parts"),
        (lambda: JPEG[:2] + b"\xff" * 100_000 + JPEG[2:], "too many parts"),
        (many_scans, "more than 50 scans"),
        (lambda: encoded(Image.fromarray(np.full((8, 8), 999, np.uint16)), "PNG"), "more than 8 bits"),
        (
            lambda: PNG[:16] + 2 * struct.pack(">I", 60_000) + PNG[24:29] + ihdr_sum() + PNG[33:],
            "at most 4096",
        ),
        (lambda: b"GIF89a" + bytes(99), "105 bytes that are no PNG or JPEG image.$"),
    ],
)
def test_files_that_are_slow_to_read_or_would_be_another_picture_are_refused(
    make: Callable[[], bytes], complaint: str
) -> None:
    data = make()
    begun = time.process_time()
    with pytest.raises(ObservationError, match=complaint):
        encoded_image.decode(data, "front")
    assert time.process_time() - begun < 1.0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_pictures_of_every_mode_of_8_bits_are_read(mode: str) -> None:
    grey = Image.new("RGB", (24, 16), (255, 255, 255)).convert(mode)
    picture = encoded_image.decode(encoded(grey, "JPEG" if mode == "CMYK" else "PNG"), "front")
    assert picture.shape == (16, 24, 3) and picture.min() > 250


def test_two_requests_without_a_seed_get_two_seeds() -> None:
    without = observation()
    del without["seed"]
    assert read_observation(without, SPEC).seed != read_observation(without, SPEC).seed


def test_keys_the_policy_has_no_use_for_are_reported() -> None:
    message = observation() | {"observation/joint_torque": np.zeros(7), "depth": 4, "episode": 4}
    assert read_observation(message, SPEC).ignored == ("depth", "observation/joint_torque")


F, W, S = "observation__images__front", "observation__images__wrist", "observation__state"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({W: None}, "'observation/images/wrist' is missing; got observation/images/front"),
        ({F: None, "observation__images__frnt": 1}, "Did you mean it by 'observation/images/frnt'"),
        ({F: np.zeros((32, 48, 3), np.float32)}, r"float32 array .* expected a uint8 array"),
        ({F: [[1, 2]]}, "'observation/images/front' is of type list"),
        ({F: np.zeros((3, 32, 48), np.uint8)}, r"has shape \(3, 32, 48\); expected .*height, width, 3"),
        ({F: np.zeros((32, 48), np.uint8)}, r"has shape \(32, 48\)"),
        ({F: np.zeros((0, 48, 3), np.uint8)}, r"has shape \(0, 48, 3\)"),
        ({F: np.broadcast_to(np.uint8(0), (5000, 2, 3))}, "at most 4096"),
        ({S: None}, "'observation/state' is missing"),
        ({S: np.zeros(7)}, r"has shape \(7,\); expected 4"),
        ({S: [0.0] * 7}, "has 7 entries; expected 4"),
        ({S: np.array(["a"] * 4)}, "expected 4 finite numbers"),
        ({S: np.array([0, 0, np.nan, 0])}, "holds nan"),
        ({"prompt": None}, "'prompt' is missing"),
        ({"prompt": 3}, "'prompt' is of type int; expected a string"),
        ({"prompt": "x" * 3000}, "3000 characters"),
        ({"seed": -1}, "'seed' is -1"),
        ({"seed": 1.5}, "'seed' is 1.5"),
        ({"seed": True}, "'seed' is True"),
    ],
)
def test_a_bad_observation_is_refused_with_key_got_and_expected(
    changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ObservationError, match=complaint):
        read_observation(observation(**changes), SPEC)


def test_a_message_that_is_no_map_is_refused() -> None:
    with pytest.raises(ObservationError, match="a map of keys to values, got of type list"):
        read_observation([1, 2], SPEC)
