"""The 1000 evaluation sequences of CALVIN's long-horizon protocol, and the scene each one starts from.

Both follow from the published rule alone: a fixed enumeration of start conditions, five tasks that can follow one
another drawn at random for each, and an initial state whose seed is a hash of the condition. NumPy's legacy
generator gives the same numbers in every version.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

Condition = Mapping[str, int | str]
"""State of the scene in words: lamps 0 or 1, door and drawer, where each block is, whether one is grasped."""

SEQUENCES: Final = 1000
LENGTH: Final = 5
COLOURS: Final = ("red", "blue", "pink")
SIDES: Final = ("right", "left")
SHELVES: Final = ("slider_right", "slider_left")
KEYS: Final = ("led", "lightbulb", "slider", "drawer", "red_block", "blue_block", "pink_block", "grasped")


@dataclass(frozen=True)
class Rule:
    """A way in which a task can be carried out: what must hold before, and what has changed after."""

    before: Mapping[str, int | str | tuple[str, ...]]
    after: Condition = field(default_factory=dict)

    def allows(self, condition: Condition) -> bool:
        """Says whether the task can be carried out this way."""
        return all(
            condition[key] in value if isinstance(value, tuple) else condition[key] == value
            for key, value in self.before.items()
        )


@dataclass(frozen=True)
class SequenceTask:
    """A task as the rule of the sequences sees it."""

    group: str
    """No two tasks of a sequence are of the same group."""
    rules: tuple[Rule, ...]

    def after(self, condition: Condition) -> Condition | None:
        """The condition that the task leaves behind; None where it cannot be carried out in exactly one way."""
        fitting = [rule for rule in self.rules if rule.allows(condition)]
        return {**condition, **fitting[0].after} if len(fitting) == 1 else None


def _block(colour: str) -> str:
    return f"{colour}_block"


def _lift(colour: str, place: str, **others: str) -> Rule:
    """Lifts a block from where it lies with an empty hand."""
    block = _block(colour)
    return Rule({block: place, **others, "grasped": 0}, {block: "grasped", "grasped": 1})


def _place(colour: str, place: str, **others: str) -> Rule:
    """Puts a grasped block down."""
    block = _block(colour)
    return Rule({block: "grasped", **others, "grasped": 1}, {block: place, "grasped": 0})


def _tasks() -> Iterator[tuple[str, SequenceTask]]:
    """The 34 tasks in the order from which the rule draws."""
    for verb in ("rotate", "push"):
        for colour, side in itertools.product(COLOURS, SIDES):
            rule = Rule({_block(colour): "table", "grasped": 0})
            yield f"{verb}_{colour}_block_{side}", SequenceTask("move on the table", (rule,))
    for side, other in (("left", "right"), ("right", "left")):
        rule = Rule({"slider": other, "grasped": 0}, {"slider": side})
        yield f"move_slider_{side}", SequenceTask("slider", (rule,))
    for verb, old, new in (("open", "closed", "open"), ("close", "open", "closed")):
        rule = Rule({"drawer": old, "grasped": 0}, {"drawer": new})
        yield f"{verb}_drawer", SequenceTask("drawer", (rule,))
    for colour in COLOURS:
        # A block in the cabinet can be reached where the door is on the other side.
        behind = (_lift(colour, "slider_left", slider="right"), _lift(colour, "slider_right", slider="left"))
        yield f"lift_{colour}_block_table", SequenceTask("lift from table", (_lift(colour, "table"),))
        yield f"lift_{colour}_block_slider", SequenceTask("lift from slider", behind)
        drawer = (_lift(colour, "drawer", drawer="open"),)
        yield f"lift_{colour}_block_drawer", SequenceTask("lift from drawer", drawer)
    into_slider = (_place(colour, f"slider_{side}", slider=side) for colour in COLOURS for side in SIDES)
    yield "place_in_slider", SequenceTask("place", tuple(into_slider))
    into_drawer = (_place(colour, "drawer", drawer="open") for colour in COLOURS)
    yield "place_in_drawer", SequenceTask("place", tuple(into_drawer))
    pairs = list(itertools.permutations(COLOURS, 2))
    stacks = tuple(
        Rule(
            {_block(top): "grasped", _block(low): "table", "grasped": 1},
            {_block(top): "stacked_top", _block(low): "stacked_bottom", "grasped": 0},
        )
        for top, low in pairs
    )
    unstacks = tuple(
        Rule(
            {_block(top): "stacked_top", _block(low): "stacked_bottom", "grasped": 0},
            {_block(top): "table", _block(low): "table"},
        )
        for top, low in pairs
    )
    yield "stack_block", SequenceTask("stack", stacks)
    yield "unstack_block", SequenceTask("unstack", unstacks)
    for lamp in ("lightbulb", "led"):
        for word, lit in (("on", 1), ("off", 0)):
            rule = Rule({lamp: 1 - lit, "grasped": 0}, {lamp: lit})
            yield f"turn_{word}_{lamp}", SequenceTask("lamps", (rule,))
    pushes = []
    for colour in COLOURS:
        others = {_block(other): SHELVES for other in COLOURS if other != colour}
        alone = Rule(
            {_block(colour): "table", **others, "drawer": "open", "grasped": 0},
            {_block(colour): "drawer", "grasped": 0},
        )
        pushes.append(alone)
    yield "push_into_drawer", SequenceTask("push into drawer", tuple(pushes))


TASKS: Final[Mapping[str, SequenceTask]] = dict(_tasks())


def start_conditions() -> list[dict[str, int | str]]:
    """The conditions that sequences start from, in the rule's order."""
    places = ("table", *SHELVES)
    choices: tuple[tuple[int | str, ...], ...] = (
        (0, 1),
        (0, 1),
        SIDES,
        ("closed", "open"),
        places,
        places,
        places,
        (0,),
    )
    values = [value for value in itertools.product(*choices) if _can_start(value)]
    return [dict(zip(KEYS, value, strict=True)) for value in values]


def _can_start(values: tuple[int | str, ...]) -> bool:
    """Says whether one or two blocks lie on the table and at most one on each side of the cabinet."""
    return values.count("table") in (1, 2) and all(values.count(shelf) < 2 for shelf in SHELVES)


def follows(condition: Condition, tasks: Sequence[str]) -> bool:
    """Says whether the tasks can be carried out one after another from a condition, no two of them alike."""
    present = condition
    for name in tasks:
        following = TASKS[name].after(present)
        if following is None:
            return False
        present = following
    return len({TASKS[name].group for name in tasks}) == len(tasks)


@functools.cache
def _shares() -> tuple[list[dict[str, int | str]], NDArray[np.int64], NDArray[np.int64]]:
    """(start conditions, number of the first sequence of each, order in which the sequences are evaluated)."""
    conditions = start_conditions()
    lengths = [len(share) for share in np.array_split(range(SEQUENCES), len(conditions))]
    order = np.arange(SEQUENCES)
    np.random.RandomState(0).shuffle(order)
    return conditions, np.cumsum([0, *lengths]), order


@functools.cache
def _drawn(number: int) -> tuple[tuple[str, ...], ...]:
    """The sequences of start condition `number`, in the order of drawing."""
    conditions, firsts, _ = _shares()
    generator = np.random.RandomState(number)
    names = list(TASKS)
    drawn: list[tuple[str, ...]] = []
    while len(drawn) < firsts[number + 1] - firsts[number]:
        tasks = tuple(names[index] for index in generator.permutation(len(names))[:LENGTH])
        if follows(conditions[number], tasks):
            drawn.append(tasks)
    return tuple(drawn)


def start_condition(index: int) -> dict[str, int | str]:
    """The condition that sequence `index` starts from; IndexError: there are 1000 sequences."""
    conditions, _, _ = _shares()
    return dict(conditions[_drawing(index)[0]])


def sequence(index: int) -> tuple[str, ...]:
    """The five tasks of sequence `index`, by name, in the order in which sequences are evaluated.

    The first sequence of a start condition takes up to half a second of drawing, the others of it none.

    Raises:
        IndexError: there are 1000 sequences, numbered from 0.
    """
    number, within = _drawing(index)
    return _drawn(number)[within]


def _drawing(index: int) -> tuple[int, int]:
    """(number of the start condition, which of its sequences) of sequence `index`."""
    if not 0 <= index < SEQUENCES:
        raise IndexError(f"sequence {index}; CALVIN has {SEQUENCES}, numbered from 0")
    _, firsts, order = _shares()
    number = int(np.searchsorted(firsts, order[index], side="right")) - 1
    return number, int(order[index] - firsts[number])


def fnv1_32(data: bytes) -> int:
    """FNV-1 hash of 32 bits as the protocol has it: from 0, not from the algorithm's offset basis."""
    value = 0
    for byte in data:
        value = (value * 16777619 & 0xFFFFFFFF) ^ byte
    return value


ROBOT: Final = (
    *(0.02586889, -0.2313129, 0.5712808, 3.09045411, -0.02908596, 1.50013585, 0.07999963),
    *(-1.21779124, 1.03987629, 2.11978254, -2.34205014, -0.87015899, 1.64119093, 0.55344928),
    1.0,
)
"""`robot_obs` at the start of every sequence: hand position (m), Euler angles (rad), opening (m), joints, gripper."""

ON_SHELF: Final = {
    "slider_left": (-2.40851662e-01, 9.24044687e-02, 4.60990009e-01),
    "slider_right": (7.03416330e-02, 9.24044687e-02, 4.60990009e-01),
}
ON_TABLE: Final = (
    (5.00000896e-02, -1.20000177e-01, 4.59990009e-01),
    (2.29995412e-01, -1.19995140e-01, 4.59990010e-01),
)
"""Metres; two blocks on the table take one each, in an order that the hash decides."""


def initial_state(condition: Condition) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The state of robot and scene at the start of a sequence.

    Returns:
        `robot_obs` (15,) and `scene_obs` (24,), float64: door, drawer, button, switch, bulb, led, then position
        and Euler angles of the red, blue and pink block.
    """
    values = [condition[key] for key in KEYS]
    generator = np.random.RandomState(fnv1_32(f"dict_values({values!r})".encode()))
    table = list(ON_TABLE)
    generator.shuffle(table)
    scene = np.zeros(24)
    scene[0] = 0.28 if condition["slider"] == "left" else 0.0
    scene[1] = 0.22 if condition["drawer"] == "open" else 0.0
    scene[3] = 0.088 if condition["lightbulb"] else 0.0
    scene[4:6] = condition["lightbulb"], condition["led"]
    places = {colour: str(condition[_block(colour)]) for colour in COLOURS}
    # With two blocks on the table the blue one takes the place that the red one leaves, the pink one the second.
    spot = {"red": 0, "blue": 1 if places["red"] == "table" else 0, "pink": 1}
    for number, colour in enumerate(COLOURS):
        first = 6 + 6 * number
        scene[first : first + 3] = ON_SHELF.get(places[colour], table[spot[colour]])
        scene[first + 5] = generator.uniform(np.pi / 2 - np.pi / 8, np.pi / 2 + np.pi / 8)
    return np.array(ROBOT), scene
