"""The tasks of Meta-World, their groups, and the instruction of each as a person would say it."""

from __future__ import annotations

import re
from collections.abc import Iterable

# The fifty tasks of MT50. Sentences are ours: Meta-World names its tasks but does not word them.
_SENTENCES = {
    "assembly": "put the ring onto the peg",
    "basketball": "drop the ball into the basket",
    "bin-picking": "move the cube from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press-topdown": "press the button from the top",
    "button-press-topdown-wall": "press the button behind the wall from the top",
    "button-press": "press the button from the front",
    "button-press-wall": "press the button behind the wall from the front",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "hand-insert": "put the hand into the hole",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-open": "open the faucet",
    "faucet-close": "close the faucet",
    "hammer": "hit the nail with the hammer",
    "handle-press-side": "press the handle down from the side",
    "handle-press": "press the handle down",
    "handle-pull-side": "pull the handle up from the side",
    "handle-pull": "pull the handle up",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "put the peg into the hole in the side",
    "pick-place-wall": "carry the puck over the wall to the goal",
    "pick-out-of-hole": "take the puck out of the hole",
    "reach": "move the hand to the goal",
    "push-back": "push the puck back to the goal",
    "push": "push the puck to the goal",
    "pick-place": "carry the puck to the goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-side": "slide the plate sideways into the cabinet",
    "plate-slide-back": "slide the plate back out of the cabinet",
    "plate-slide-back-side": "slide the plate sideways out of the cabinet",
    "peg-unplug-side": "pull the peg out of the side",
    "soccer": "push the ball into the goal",
    "stick-push": "push the box with the stick",
    "stick-pull": "pull the box with the stick",
    "push-wall": "push the puck around the wall to the goal",
    "reach-wall": "move the hand past the wall to the goal",
    "shelf-place": "put the puck on the shelf",
    "sweep-into": "sweep the puck into the hole",
    "sweep": "sweep the puck off the table",
    "window-open": "open the window",
    "window-close": "close the window",
}

TASKS = tuple(f"{name}-v3" for name in _SENTENCES)
"""Names as Meta-World 3 spells them."""

HORIZON = 500
"""Meta-World's own `max_path_length`, in steps."""


def instruction(task: str) -> str:
    """The sentence that a policy gets as its prompt; derived from the name where none is written."""
    name = re.sub(r"-v\d+$", "", task)
    return _SENTENCES.get(name, name.replace("-", " "))


_MT10 = (
    "reach",
    "push",
    "pick-place",
    "door-open",
    "drawer-open",
    "drawer-close",
    "button-press-topdown",
    "peg-insert-side",
    "window-open",
    "window-close",
)
_ML10_TRAIN = (
    "reach",
    "push",
    "pick-place",
    "door-open",
    "drawer-close",
    "button-press-topdown",
    "peg-insert-side",
    "window-open",
    "sweep",
    "basketball",
)
_ML10_TEST = ("drawer-open", "door-close", "shelf-place", "sweep-into", "lever-pull")
_ML45_TEST = ("bin-picking", "box-close", "hand-insert", "door-lock", "door-unlock")


def splits() -> dict[str, tuple[str, ...]]:
    """Meta-World's own groups of tasks, by name.

    MT1 and ML1 are of one task each. What ML1 calls train and test are initial states of that task: here, seeds.
    """

    def full(names: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{name}-v3" for name in names)

    return {
        "MT10": full(_MT10),
        "MT50": TASKS,
        "ML10/train": full(_ML10_TRAIN),
        "ML10/test": full(_ML10_TEST),
        "ML45/train": tuple(task for task in TASKS if task not in full(_ML45_TEST)),
        "ML45/test": full(_ML45_TEST),
        **{f"{group}/{task}": (task,) for group in ("MT1", "ML1") for task in TASKS},
    }
