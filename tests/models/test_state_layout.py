"""Chosen entries of a robot's state, and angles without jumps."""

from __future__ import annotations

import numpy as np
import pytest

from defi_models.errors import ConfigurationError
from defi_models.inputs.action_contract import ActionContract
from defi_models.inputs.state_layout import StateLayout, chosen_layout

NAMES = ("x", "y", "roll", "gripper")


def layout(*choice: object, centres: tuple[float, ...] = (0.0, 0.0, 3.1, 0.0)) -> StateLayout:
    return chosen_layout(choice, 4, NAMES, centres, "data.corpora.c.state")


def test_entries_are_chosen_by_name_or_index_in_the_order_given() -> None:
    states = np.arange(12.0).reshape(3, 4)
    assert (layout("gripper", 0, {"name": "y"}, {"index": 3}).apply(states) == states[:, [3, 0, 1, 3]]).all()


def test_an_angle_becomes_sine_and_cosine() -> None:
    chosen = layout("x", {"name": "roll", "angle": "sin_cos"})
    found = chosen.apply(np.array([0.5, 0.0, np.pi / 2, 9.0]))
    assert chosen.width == 3 and found.dtype == np.float32
    assert found == pytest.approx([0.5, 1.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("around", [None, 3.0, -3.0])
def test_an_unwrapped_angle_does_not_jump_where_the_raw_one_does(around: float | None) -> None:
    true = np.linspace(2.6, 3.7, 50)
    raw = (true + np.pi) % (2 * np.pi) - np.pi
    assert np.abs(np.diff(raw)).max() > 6
    item = {"name": "roll", "angle": "unwrap"} | ({} if around is None else {"around": around})
    states = np.zeros((50, 4))
    states[:, 2] = raw
    found = layout(item).apply(states)[:, 0]
    assert np.abs(np.diff(found)).max() < 0.1 and np.cos(found - true) == pytest.approx(1.0)
    # One state alone, as a server gets it, is what it was among the others.
    assert [layout(item).apply(state)[0] for state in states] == found.tolist()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("rol", r"state\[0\] is 'rol', which the states do not have. Did you mean 'roll'\?"),
        (4, r"state\[0\] is 4; the states have entries 0 to 3"),
        (-1, "entries 0 to 3"),
        ({"name": "roll", "angel": "unwrap"}, "there is no key 'angel'. Did you mean 'angle'"),
        ({"name": "roll", "angle": "degrees"}, "angle is 'degrees'; choose none, sin_cos, unwrap"),
        ({"name": "roll", "index": 2}, "a name, an index, or a mapping with one of both"),
        ({"name": "roll", "angle": "unwrap", "around": "pi"}, "an angle in radians is expected"),
        (1.5, "a name, an index"),
        (True, "a name, an index"),
    ],
)
def test_an_entry_that_is_not_there_is_named_with_what_is(item: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        layout(item)


def test_names_need_a_corpus_that_gives_some() -> None:
    with pytest.raises(ConfigurationError, match=r"have no names\. Choose by index, 0 to 3"):
        chosen_layout(["x"], 4, (), (), "data.corpora.c.state")


def test_the_layout_travels_with_the_contract() -> None:
    chosen = layout("x", {"name": "roll", "angle": "unwrap"})
    assert layout("x", {"index": 2, "angle": "sin_cos"}).width == 3
    contract = ActionContract(names=("a",), state=chosen)
    assert ActionContract.from_mapping(contract.as_mapping()) == contract
    without = {name: value for name, value in contract.as_mapping().items() if name != "state"}
    assert ActionContract.from_mapping(without).state is None


def test_a_state_of_another_width_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="a state has 3 numbers; 4 are expected"):
        layout("x").apply(np.zeros(3))
