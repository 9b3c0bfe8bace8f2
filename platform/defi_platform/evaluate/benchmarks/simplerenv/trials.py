"""The official trials of SimplerEnv's Google Robot tasks: which scene is built, where robot and objects start.

Seed n of a task is its trial n: the scenes in the order below, in each the robot's places, at each those of the object.
Needs no simulator. The numbers are those of the evaluation scripts of simpler-env/SimplerEnv.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from defi_platform.evaluate.benchmarks.interface import LAST, Task

MATCHING, VARIANTS = "visual_matching", "variant_aggregation"
"""The two protocols, whose rates are never averaged: a photo of the real scene behind robot and objects, and the
simulated scene in several looks."""
CANS, NEAR, DRAWERS, APPLE = "pick_coke_can", "move_near", "drawer", "place_apple_in_drawer"
"""The families of tasks, of which each protocol has a rate."""
FAMILIES = (CANS, NEAR, DRAWERS, APPLE)

_HORIZONS = {CANS: 80, NEAR: 80, DRAWERS: 113, APPLE: 200}
_COLOURS = (
    "", "recolor_tabletop_visual_matching_1", "recolor_tabletop_visual_matching_2", "recolor_cabinet_visual_matching_1",
)  # fmt: skip
"""Of the robot's arm, in visual matching."""


@dataclass(frozen=True)
class Place:
    """A place of the robot: metres, and radians from facing the table."""

    x: float
    y: float
    yaw: float = 0.0
    photo: str | None = None
    """Of the real scene from there, laid behind robot and objects; a file of data/real_inpainting."""


@dataclass(frozen=True)
class Scene:
    """One look of a task's scene, and what starts where in it."""

    environment: str
    """As ManiSkill2_real2sim registers it."""
    stage: str
    """Name of the scene's file, data/hab2_bench_assets/stages/<stage>.glb; dummy_...: there is none."""
    places: tuple[Place, ...]
    objects: tuple[tuple[float, float] | int, ...]
    """Where the object is dropped, metres; a number: of an arrangement of several that the environment knows."""
    build: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the environment."""
    ray_traced: bool = False

    @property
    def trials(self) -> int:
        """Number of its initial states."""
        return len(self.places) * len(self.objects)


@dataclass(frozen=True)
class Trials:
    """A task with all of its official trials."""

    task: Task
    protocol: str
    family: str
    scenes: tuple[Scene, ...]

    @property
    def count(self) -> int:
        """Number of its initial states."""
        return sum(scene.trials for scene in self.scenes)

    def trial(self, number: int) -> tuple[Scene, Place, tuple[float, float] | int]:
        """Scene, place of the robot and start of the object.

        Raises:
            ValueError: there is no trial of that number.
        """
        left = number
        for scene in self.scenes if number >= 0 else ():
            if left < scene.trials:
                return (
                    scene,
                    scene.places[left // len(scene.objects)],
                    scene.objects[left % len(scene.objects)],
                )
            left -= scene.trials
        raise ValueError(f"{self.task.name} has the initial states 0 to {self.count - 1}, and not {number}")


def _grid(xs: tuple[float, float, int], ys: tuple[float, float, int]) -> tuple[tuple[float, float], ...]:
    """Points of a grid, row by row; each range is (first, last, how many)."""
    return tuple((float(x), float(y)) for x in np.linspace(*xs) for y in np.linspace(*ys))


_DRAWER_PLACES = tuple(
    Place(x, y, yaw, f"open_drawer_{name}.png")
    for name, x, y, yaw in (
        ("a0", 0.644, -0.179, -0.03), ("a1", 0.765, -0.182, -0.02), ("a2", 0.889, -0.203, -0.06),
        ("b0", 0.652, 0.009, 0.0), ("b1", 0.752, 0.009, 0.0), ("b2", 0.851, 0.035, 0.0),
        ("c0", 0.665, 0.224, 0.0), ("c1", 0.765, 0.222, -0.025), ("c2", 0.865, 0.222, -0.025),
    )
)  # fmt: skip
_TABLE = "google_pick_coke_can_1_v4"
_APARTMENT = "frl_apartment_stage_simple"
_TABLE_LOOKS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("", _TABLE, {}),
    ("", "Baked_sc1_staging_objaverse_cabinet1_h870", {}),
    ("", "Baked_sc1_staging_objaverse_cabinet2_h870", {}),
    ("", f"{_TABLE}_alt_background", {}),
    ("", f"{_TABLE}_alt_background_2", {}),
    ("", _TABLE, {"slightly_darker_lighting": True}),
    ("", _TABLE, {"slightly_brighter_lighting": True}),
    ("AltGoogleCamera", _TABLE, {}),
    ("AltGoogleCamera2", _TABLE, {}),
)
"""Of cans and of moving near: what the environment's name has beside, the stage, further arguments."""
_APARTMENT_LOOKS: tuple[tuple[str, dict[str, Any]], ...] = (
    (_APARTMENT, {}),
    ("modern_bedroom_no_roof", {}),
    ("modern_office_no_roof", {}),
    (_APARTMENT, {"light_mode": "brighter"}),
    (_APARTMENT, {"light_mode": "darker"}),
    (_APARTMENT, {"station_name": "mk_station2"}),
    (_APARTMENT, {"station_name": "mk_station3"}),
)
"""Of drawers: stage and further arguments."""
_CABINET = {"station_name": "mk_station_recolor", "light_mode": "simple", "disable_bad_material": True}
"""Of drawers in visual matching."""


def _cans(orientation: str, protocol: str) -> tuple[Scene, ...]:
    name, objects = "GraspSingleOpenedCokeCan{}InScene-v0", _grid((-0.35, -0.12, 5), (-0.02, 0.42, 5))
    lying = {orientation: True}
    if protocol == MATCHING:
        place = (Place(0.35, 0.20, 0.0, "google_coke_can_real_eval_1.png"),)
        return tuple(
            Scene(name.format(""), _TABLE, place, objects, {**lying, "urdf_version": colour})
            for colour in _COLOURS
        )
    looks = (*_TABLE_LOOKS, ("Distractor", _TABLE, {}), ("Distractor", _TABLE, {"distractor_config": "more"}))
    return tuple(
        Scene(name.format(beside), stage, (Place(0.35, 0.20),), objects, {**lying, **more})
        for beside, stage, more in looks
    )


def _near(protocol: str) -> tuple[Scene, ...]:
    objects = tuple(range(60))
    if protocol == MATCHING:
        place = (Place(0.35, 0.21, -0.09, "google_move_near_real_eval_1.png"),)
        return tuple(
            Scene("MoveNearGoogleBakedTexInScene-v0", _TABLE, place, objects, {"urdf_version": colour})
            for colour in _COLOURS
        )
    looks = (*_TABLE_LOOKS, ("", _TABLE, {"no_distractor": True}))
    return tuple(
        Scene(f"MoveNear{beside or 'Google'}InScene-v0", stage, (Place(0.35, 0.21, -0.09),), objects, more)
        for beside, stage, more in looks
    )


def _drawers(environment: str, protocol: str, apple: bool) -> tuple[Scene, ...]:
    objects = _grid((-0.08, -0.02, 3), (-0.02, 0.08, 3)) if apple else ((0.0, 0.0),)
    if protocol == MATCHING:
        places = tuple(place for place in _DRAWER_PLACES if not apple or str(place.photo).endswith("0.png"))
        model = {"model_ids": "baked_apple_v2"} if apple else {}
        return tuple(
            Scene(
                environment, "dummy_drawer", places, objects, {**_CABINET, "urdf_version": colour, **model},
                ray_traced=True,
            )
            for colour in _COLOURS
        )  # fmt: skip
    xs = (0.65, 0.65, 1) if apple else (0.65, 0.85, 3)
    places = tuple(Place(x, y) for x, y in _grid(xs, (-0.2, 0.2, 3)))
    model = {"model_ids": "apple"} if apple else {}
    return tuple(
        Scene(environment, stage, places, objects, {**more, **model}, ray_traced=True)
        for stage, more in _APARTMENT_LOOKS
    )


def _all(protocol: str) -> Iterator[tuple[str, str, str, tuple[Scene, ...]]]:
    """Yields (family, name, instruction, scenes)."""
    for name, orientation in (
        ("horizontal", "lr_switch"),
        ("standing", "upright"),
        ("vertical", "laid_vertically"),
    ):
        yield CANS, f"pick_{name}_coke_can", "pick coke can", _cans(orientation, protocol)
    yield NEAR, "move_near", "move one object near another", _near(protocol)
    for verb in ("open", "close"):
        for drawer in ("top", "middle", "bottom"):
            environment = f"{verb.title()}{drawer.title()}DrawerCustomInScene-v0"
            text = f"{verb} {drawer} drawer"
            yield DRAWERS, text.replace(" ", "_"), text, _drawers(environment, protocol, apple=False)
    environment = "PlaceIntoClosedTopDrawerCustomInScene-v0"
    yield APPLE, "place_apple_in_top_drawer", "open top drawer", _drawers(environment, protocol, apple=True)


TRIALS: Mapping[str, Trials] = {
    f"{protocol}/{name}": Trials(
        Task(f"{protocol}/{name}", text, _HORIZONS[family], LAST), protocol, family, scenes
    )
    for protocol in (MATCHING, VARIANTS)
    for family, name, text, scenes in _all(protocol)
}
"""By the task's name."""


def of_family(protocol: str, family: str) -> Sequence[str]:
    """Names of a family's tasks under a protocol."""
    return tuple(name for name, one in TRIALS.items() if (one.protocol, one.family) == (protocol, family))
