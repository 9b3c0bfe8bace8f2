"""Distances between the initial states of an evaluation and those that the policy's training recorded.

A seed that no recording used may still give nearly the same scene. The distance of two states is the largest displacement
of any object or goal between them, in the units of the simulator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAME = 1e-6
"""Distance up to which two states are the same one."""
_AT_ONCE = 4_000_000
"""Pairs of states that are compared at a time."""

Positions = Mapping[str, float]
"""Name of an object or goal and its axis ("cube_x") to value, as `Benchmark.initial_positions`."""


def state_distances(
    recorded: Mapping[str, Sequence[Positions]], tested: Mapping[str, Sequence[Positions]]
) -> dict[str, dict[str, Any]]:
    """Distances to the nearest recorded state, by task; tasks of which positions are not known on both sides are left out.

    Args:
        recorded: initial states by task.
        tested: those of an evaluation.

    Returns: by task the numbers of states `tested` and `recorded`; of the tested ones the `median` and the `largest`
        distance to the nearest recorded one, and how many are the `same`; the median distance of the recorded ones to
        their nearest other one, `recorded_median` (None: there is one alone).
    """
    found = {}
    for task, states in tested.items():
        known = [one for one in recorded.get(task, ()) if one]
        states = [one for one in states if one]
        if not known or not states:
            continue
        names = sorted(set.intersection(*(set(one) for one in [*known, *states])))
        if not names:
            continue
        nearest = _nearest(_places(states, names), _places(known, names), names)
        among = _nearest(_places(known, names), _places(known, names), names, but_itself=True)
        found[task] = {
            "tested": len(states),
            "recorded": len(known),
            "median": float(np.median(nearest)),
            "largest": float(nearest.max()),
            "same": int((nearest <= SAME).sum()),
            "recorded_median": float(np.median(among)) if len(known) > 1 else None,
        }
    return found


def distance_line(distances: Mapping[str, Mapping[str, Any]]) -> str:
    """One line about `state_distances`, of the task that lies nearest."""
    near = min(distances, key=lambda task: distances[task]["median"])
    one = distances[near]
    among = one["recorded_median"]
    return (
        f"initial states of the policy's training are known for {len(distances)} tasks; nearest in {near}: a tested state "
        f"lies {one['median']:.3g} (median; at most {one['largest']:.3g}) from the nearest recorded one"
        + ("" if among is None else f", recorded ones {among:.3g} from each other")
        + f"; {sum(each['same'] for each in distances.values())} of all are the same as a recorded one"
    )


def _places(states: Sequence[Positions], names: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[state[name] for name in names] for state in states], np.float64)


def _nearest(
    states: NDArray[np.float64], others: NDArray[np.float64], names: Sequence[str], but_itself: bool = False
) -> NDArray[np.float64]:
    """(N,) distance of each of `states` (N, K) to the nearest of `others` (M, K), whose columns are `names`."""
    things = [name.rpartition("_")[0] for name in names]
    columns = [np.array([one == thing for one in things]) for thing in dict.fromkeys(things)]
    nearest, size = np.empty(len(states)), max(1, _AT_ONCE // len(others))
    for first in range(0, len(states), size):
        moved = states[first : first + size, None] - others[None]
        apart = np.max([np.linalg.norm(moved[..., own], axis=-1) for own in columns], axis=0)
        if but_itself:
            rows = np.arange(len(apart))
            apart[rows, first + rows] = np.inf
        nearest[first : first + size] = apart.min(axis=1)
    return nearest
