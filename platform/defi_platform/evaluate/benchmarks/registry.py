"""The benchmarks there are, and what a config names of them: tasks, options, cameras. Needs no simulator."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from defi_models.errors import did_you_mean
from defi_platform.errors import ConfigError, one_line
from defi_platform.evaluate.benchmarks.interface import Benchmark, Registration, Task, View

_FOLDER = "defi_platform.evaluate.benchmarks"

REGISTERED: dict[str, Registration] = {
    "metaworld": Registration(
        f"{_FOLDER}.metaworld.benchmark:MetaWorld", extra="sim", needs=("metaworld", "mujoco")
    ),
    "libero": Registration(
        f"{_FOLDER}.libero.benchmark:Libero", extra="libero", needs=("libero", "robosuite")
    ),
    "pusht": Registration(f"{_FOLDER}.pusht.pusht:PushT", extra="pusht", needs=("gym_pusht",)),
    "fetch": Registration(f"{_FOLDER}.fetch.fetch:Fetch", extra="fetch", needs=("gymnasium_robotics",)),
    "calvin": Registration(
        f"{_FOLDER}.calvin.benchmark:Calvin", environment="calvin", needs=("calvin_env", "pybullet")
    ),
    "simplerenv": Registration(
        f"{_FOLDER}.simplerenv.benchmark:SimplerEnv",
        environment="simplerenv",
        needs=("sapien", "mani_skill2_real2sim"),
    ),
}
"""By the name that a config says."""

ALL = "all"
"""In the place of a task: all of them."""


def registration(name: str) -> Registration:
    """Place and installation of a benchmark, by its name or as module:Class.

    Raises:
        ConfigError: there is no such benchmark.
    """
    if name in REGISTERED:
        return REGISTERED[name]
    if ":" in name:
        return Registration(name)
    raise ConfigError(
        f"benchmark: there is none of the name '{name}'.{did_you_mean(name, REGISTERED)} "
        "One from outside is named as module:Class."
    )


def benchmark_class(name: str) -> type[Benchmark]:
    """The class of a benchmark; its simulator is not imported.

    Args:
        name: one of REGISTERED, or module:Class of one from outside.

    Raises:
        ConfigError: there is no such benchmark, or what is there is none.
    """
    module, _, attribute = registration(name).where.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"benchmark {name}: {one_line(error)}.") from error
    if not (isinstance(found, type) and issubclass(found, Benchmark)):
        raise ConfigError(f"benchmark {name}: that is no subclass of {Benchmark.__module__}.Benchmark.")
    return found


def selected_options(benchmark: type[Benchmark], options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a benchmark with their values, those of a config among them.

    Raises:
        ConfigError: it has no such option, or the option no such value.
    """
    try:
        return benchmark.resolved_options(options)
    except ValueError as error:
        raise ConfigError(f"options: {error}.") from error


def selected_tasks(
    benchmark: type[Benchmark], options: Mapping[str, Any], names: Sequence[str]
) -> tuple[Task, ...]:
    """The tasks that a config names, each once, in the order of the names.

    Args:
        benchmark: its class.
        options: all of the benchmark's options, see `selected_options`.
        names: tasks, names of splits, or `all`.

    Raises:
        ConfigError: there are no names, a name is unknown (with the nearest), or a task is named twice.
    """
    tasks = {task.name: task for task in benchmark.tasks(options)}
    splits = benchmark.splits()
    if not names:
        raise ConfigError(
            f"tasks is empty; name at least one task of {benchmark.name}, e.g. '{next(iter(tasks))}', or {ALL}."
        )
    chosen: dict[str, Task] = {}
    for position, name in enumerate(names):
        if name in tasks:
            if name in names[:position]:
                raise ConfigError(f"tasks names '{name}' twice; name each task once.")
            members: Sequence[str] = (name,)
        elif name == ALL:
            members = tuple(tasks)
        elif name in splits:
            members = splits[name]
        else:
            near = did_you_mean(name, [*tasks, *splits, ALL])
            raise ConfigError(f"tasks: {benchmark.name} has no task '{name}'.{near}")
        # Groups overlap: a task of two of them is run once.
        chosen.update({member: tasks[member] for member in members})
    return tuple(chosen.values())


def selected_view(
    benchmark: type[Benchmark],
    cameras: Sequence[str] | None,
    size: tuple[int | None, int | None],
    *,
    videos: bool,
) -> View:
    """The cameras and the size of their images.

    Args:
        benchmark: its class.
        cameras: names; None for the benchmark's default.
        size: height and width in pixels; None for the benchmark's default.
        videos: the images are also written as H.264.

    Raises:
        ConfigError: there is no such camera, or no images of this size.
    """
    names = benchmark.default_view.cameras if cameras is None else tuple(cameras)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"cameras is {list(names)}; name one or more, each once.")
    for name in names:
        if name not in benchmark.cameras:
            raise ConfigError(
                f"cameras: {benchmark.name} has no camera '{name}'. There is: {', '.join(benchmark.cameras)}."
            )
    if 0 in size:
        raise ConfigError(f"height and width are {size[0]} and {size[1]}; they must be 1 or more.")
    view = benchmark.default_view.asked(names, *size)
    for height, width in map(view.size, names):
        if height < 1 or width < 1:
            raise ConfigError(f"height and width are {height} and {width}; they must be 1 or more.")
        if videos and (height < 16 or width < 16 or height % 2 or width % 2):
            raise ConfigError(
                f"cameras: frames of {height} x {width} cannot be stored as H.264 yuv420p; "
                "height and width must be even and at least 16."
            )
    if wrong := benchmark.check_view(view):
        raise ConfigError(f"cameras: {wrong}.")
    return view
