"""Chunks, limits, the fixed rate and the wire format of defi_client, each by itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from defi_client import wire
from defi_client.chunks import Chunks
from defi_client.errors import FitError, ProtocolError, UnsafeActionError
from defi_client.limits import Limits
from defi_client.pacing import Pacer


def test_the_newest_chunk_takes_over_where_the_robot_is() -> None:
    chunks = Chunks()
    assert chunks.action(0) is None and chunks.newest is None
    chunks.add(0, np.arange(4.0)[:, None])
    chunks.add(2, 10 + np.arange(4.0)[:, None])
    assert [chunks.action(n)[0] for n in (3, 4, 5)] == [11, 12, 13]  # type: ignore[index]
    assert chunks.action(6) is None and chunks.newest is None


def test_ensembling_weighs_from_the_oldest_as_act_does() -> None:
    chunks = Chunks(ensemble=0.5)
    for start in range(3):
        chunks.add(start, np.full((4, 2), float(start)))
    weights = np.exp(-0.5 * np.arange(3))
    assert np.allclose(chunks.action(3), weights @ np.arange(3.0) / weights.sum())
    assert np.allclose(chunks.action(4), (1 * 1 + np.exp(-0.5) * 2) / (1 + np.exp(-0.5)))
    assert np.allclose(chunks.action(5), 2)
    for ensemble in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match=f"ensemble is {ensemble}"):
            Chunks(ensemble)


STATE = np.array([0.5, 0.0])


@pytest.mark.parametrize(
    ("limits", "action", "last", "expected", "changed"),
    [
        ({}, [5, -5], None, [5, -5], ()),
        ({"low": [-1, -1], "high": [1, 1]}, [5, -5], None, [1, -1], ("range",)),
        ({"box_low": [0, 0], "box_high": [1, 1]}, [2, 0.5], None, [1, 0.5], ("box",)),
        ({"speed": [1, 1], "position": [0, 1]}, [0.9, 0], None, [0.6, 0], ("speed",)),
        ({"speed": [1, 1], "position": [0, 1]}, [0.9, 0], [0.7, 0], [0.8, 0], ("speed",)),
        ({"speed": [1, np.inf], "position": [0, None]}, [0.5, 9], None, [0.5, 9], ()),
        ({"relative": True, "speed": [1, 1]}, [0.5, 0.05], [9, 9], [0.1, 0.05], ("speed",)),
        ({"relative": True, "box_high": [0.6, 1], "position": [0, 1], "scale": 0.5}, [1, 1], None, [0.2, 1], ("box",)),
        ({"relative": True, "box_high": [0.4, 1], "position": [0, 1]}, [0.1, 0], None, [0, 0], ("box",)),
        ({"relative": True, "box_high": [0.4, 1], "position": [0, 1]}, [-0.3, 0], None, [-0.3, 0], ()),
    ],
)  # fmt: skip
def test_limits_clip(limits: Any, action: Any, last: Any, expected: Any, changed: Any) -> None:
    last = None if last is None else np.asarray(last, float)
    safe, found = Limits(**limits).applied(np.asarray(action, float), STATE, last, 0.1)
    assert np.allclose(safe, expected) and found == changed


def test_limits_refuse() -> None:
    limits = Limits(low=[-1, -1], high=[1, 1], outside="refuse")
    with pytest.raises(UnsafeActionError, match=r"dimension 1 is 3; the limit \(range\) is 1"):
        limits.applied(np.array([0.0, 3.0]), STATE, None, 0.1)
    for action, words in (
        ([0, np.nan], "not finite"),
        ([0, np.inf], "not finite"),
        ([0, 0, 0], "for 2 numbers"),
    ):
        with pytest.raises(UnsafeActionError, match=words):
            limits.applied(np.array(action, float), STATE, None, 0.1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"speed": [1]}, "speed of absolute actions needs `position`"),
        ({"box_low": [1], "relative": True}, "box of relative actions needs `position`"),
        ({"low": [1], "high": [1, 2]}, "different widths"),
        ({"low": [2], "high": [1]}, "hold nothing"),
        ({"outside": "warn"}, "outside is 'warn'"),
        ({"low": [np.nan]}, "low is .nan.; write inf or -inf"),
        ({"box_high": [1, np.nan]}, "box_high is .1, nan."),
        ({"relative": True, "scale": 0}, "scale is 0"),
        ({"relative": True, "scale": np.nan}, "scale is nan"),
        ({"position": [-1]}, "count from 0"),
    ],
)
def test_limits_that_cannot_be_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Limits(**settings)


def test_a_limit_that_makes_an_action_infinite_lets_nothing_through() -> None:
    with pytest.raises(UnsafeActionError, match="not finite after its limits"):
        Limits(low=[np.inf, 0]).applied(np.zeros(2), STATE, None, 0.1)


def test_after_a_hold_a_dimension_without_a_place_keeps_its_speed() -> None:
    limits = Limits(speed=[1, 1], position=[0, None])
    last = limits.after_hold(np.array([0.9, 0.2]))
    safe, changed = limits.applied(np.array([0.9, 0.8]), STATE, last, 0.1)
    assert np.allclose(safe, [0.6, 0.3]) and changed == ("speed",), "from the state, and from the last action"


def test_limits_of_another_robot_are_refused() -> None:
    for limits, words in (
        (Limits(low=[0, 0, 0]), "low is for 3 action dims, the robot takes 2"),
        (Limits(position=[0, 2]), "names entry 2 of the state, which has 2"),
    ):
        with pytest.raises(FitError, match=words):
            limits.check_fits(2, 2)
    Limits(position=[1, None], box_low=[0, 0], relative=True).check_fits(2, 2)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds + 0.001


def test_the_rate_is_kept_and_a_step_that_took_too_long_is_not_made_up_for() -> None:
    clock = Clock()
    pacer, begun = Pacer(10, clock), []
    for work_s in (0.02, 0.25, 0.02, 0.02):
        pacer.wait()
        begun.append(clock.now)
        clock.now += work_s
    assert np.allclose(begun, [0, 0.101, 0.351, 0.452])
    assert pacer.overruns == 1 and np.isclose(pacer.jitter_ms()["max"], 151.0), "the late step too"
    with pytest.raises(ValueError, match="rate_hz is 0"):
        Pacer(0)


def test_messages_come_back_as_they_were_sent() -> None:
    sent = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.float64(2.5),
        "c": ["x", 1, None],
        "d": b"\0",
    }
    back = wire.unpack(wire.pack(sent))
    assert np.array_equal(back["a"], sent["a"]) and back["a"].dtype == np.float32
    assert back["b"] == 2.5 and back["c"] == sent["c"] and back["d"] == b"\0"


@pytest.mark.parametrize(
    "value",
    [np.array(["x"]), np.array([None]), np.array([1j]), object(), {"x": {1, 2}}],
    ids=["text", "object array", "complex", "object", "set"],
)
def test_what_has_no_form_is_not_sent(value: Any) -> None:
    with pytest.raises(ProtocolError):
        wire.pack({"value": value})


@pytest.mark.parametrize(
    "entries",
    [
        {b"__ndarray__": True},
        {b"__ndarray__": True, b"data": b"12", b"dtype": "|O", b"shape": [1]},
        {b"__ndarray__": True, b"data": b"12", b"dtype": "<f4", b"shape": [1]},
        {b"__ndarray__": True, b"data": b"1234", b"dtype": "<f4", b"shape": [7]},
        {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"},
    ],
)  # fmt: skip
def test_arrays_that_are_none_are_refused(entries: Any) -> None:
    import msgpack

    with pytest.raises(ProtocolError, match="not msgpack with arrays"):
        wire.unpack(msgpack.packb(entries))
