"""The instruction of each Meta-World task, as a person would say it. Needs no simulator."""

from __future__ import annotations

import re

from defi_models.errors import did_you_mean
from defi_platform.errors import ConfigError

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


def instruction(task: str) -> str:
    """The sentence that a policy gets as its prompt; derived from the name where none is written."""
    name = re.sub(r"-v\d+$", "", task)
    return _SENTENCES.get(name, name.replace("-", " "))


def check_tasks(tasks: list[str], key: str) -> None:
    """Checks the names of tasks.

    Args:
        tasks: names as in TASKS.
        key: of the configuration, for the message.

    Raises:
        ConfigError: the list is empty, a name is unknown (with the nearest) or stands there twice.
    """
    if not tasks:
        raise ConfigError(f"{key} is empty; name at least one Meta-World task, e.g. 'drawer-close-v3'.")
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"{key}: Meta-World has no task '{task}'.{did_you_mean(task, TASKS)}")
        if tasks.count(task) > 1:
            raise ConfigError(f"{key} names '{task}' twice; name each task once.")
