"""Interface of a benchmark: tasks, initial states, observations, actions and success, whatever the simulator.

A benchmark is one class. What it says of itself (class methods and attributes) needs numpy alone, so that a
config is checked where the simulator is not installed; an instance is the simulator itself and lives in a
process of its own, in the interpreter that has the simulator's packages. Nothing here imports Ray or torch.

Shapes: H height, W width in pixels; S numbers of the state; A numbers of an action; K actions of a chunk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from defi_platform.evaluate.benchmarks.published import PublishedChains

FIRST, LAST = "first", "last"
"""States that decide a task, see `Task.decided`."""


@dataclass(frozen=True)
class Task:
    """A task of a benchmark, or one of the subtasks of a chain."""

    name: str
    instruction: str
    """The text that the policy gets."""
    horizon: int
    """Control steps after which it counts as failed."""
    decided: str = FIRST
    """FIRST: solved, and over, as soon as a state is a success. LAST: it goes on to its horizon, or to where the
    simulator ends it, and is solved where the last state is a success."""


@dataclass(frozen=True)
class ActionSpec:
    """The action space of a benchmark and what is done to a policy's actions before they are executed."""

    names: tuple[str, ...]
    """Of the A dimensions."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    clip: bool = True
    """Clip to [low, high]."""
    binary: tuple[int, ...] = ()
    """Dimensions that take `low` or `high` and nothing between: grippers, as a rule."""
    threshold: float = 0.0
    """A value above it becomes `high` in a binary dimension, any other `low`."""
    relative: bool = True
    """Displacements; False: targets in the robot's frame."""

    @property
    def dim(self) -> int:
        """Number of dimensions, A."""
        return len(self.names)

    def prepared(self, actions: NDArray[np.floating]) -> NDArray[np.float32]:
        """Actions as they are executed.

        Args:
            actions: (K, A) as a policy gave them.

        Returns:
            float32 (K, A), clipped and with binary dimensions set.
        """
        prepared = np.array(actions, dtype=np.float32)
        low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
        if self.clip:
            prepared = np.clip(prepared, low, high)
        for index in self.binary:
            prepared[:, index] = np.where(prepared[:, index] > self.threshold, high[index], low[index])
        return prepared


@dataclass(frozen=True)
class View:
    """The cameras of a simulator that are looked through, and the size of their images."""

    cameras: tuple[str, ...]
    height: int
    width: int
    """Pixels."""
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """(height, width) of cameras that have another size than that."""

    def size(self, camera: str) -> tuple[int, int]:
        """(height, width) of a camera's images."""
        height, width = self.sizes.get(camera, (self.height, self.width))
        return height, width

    def asked(self, cameras: Sequence[str] | None, height: int | None, width: int | None) -> View:
        """This view as a default, with what a config asks for in its place.

        Args:
            cameras: None keeps those of this view.
            height: pixels of every camera; None keeps what each has.
            width: as `height`.
        """
        names = tuple(cameras if cameras is not None else self.cameras)
        sizes = {name: self.size(name) for name in names if name in self.sizes}
        return View(
            names,
            height or self.height,
            width or self.width,
            {name: (height or high, width or wide) for name, (high, wide) in sizes.items()},
        )


@dataclass(frozen=True)
class Observation:
    """Pictures and state, as a policy gets them."""

    images: dict[str, NDArray[np.uint8]]
    """By camera: uint8 (H, W, 3), upright."""
    state: NDArray[np.float32]
    """(S,), see Benchmark.state_names."""


@dataclass(frozen=True)
class Step:
    """The result of one executed action."""

    success: bool
    """The (sub)task is solved in the state after the action."""
    state: NDArray[np.float32]
    """(S,) after the action."""
    reward: float = 0.0
    done: bool = False
    """The simulator itself has ended the episode, solved or not."""
    instruction: str | None = None
    """Text that the policy gets from here on, where it has just changed; what is left of a chunk is not executed."""

    def ends_chunk(self, through: bool) -> bool:
        """Whether no further action of the chunk is executed.

        Args:
            through: success alone ends nothing.
        """
        return self.done or self.instruction is not None or (self.success and not through)


class Benchmark(ABC):
    """A benchmark, and an instance of it the one simulator of a process.

    An episode is `reset(task, seed)`, then per subtask of `chain(task, seed)` `begin(index)` and steps until
    success or the subtask's horizon (see `Task.decided`); the first subtask that fails ends it. Most benchmarks have chains of one.
    The state after `reset` must depend on (task, seed) alone, not on episodes before it.
    """

    name: ClassVar[str]
    cameras: ClassVar[tuple[str, ...]]
    """All that can be asked for; the first is the default."""
    default_view: ClassVar[View]
    state_names: ClassVar[tuple[str, ...]]
    action: ClassVar[ActionSpec]
    control_hz: ClassVar[float]
    robot: ClassVar[str] = ""
    """As datasets call it; empty: the benchmark's name."""
    has_expert: ClassVar[bool] = False
    pooled_by: ClassVar[str] = "episodes"
    """How a rate over tasks is pooled: "episodes" (all alike) or "tasks" (mean of the tasks' rates)."""
    options: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Settings of its own that decide outcomes, e.g. {"horizon": ("official", "released")}: name to the values
    it may have, the first being the default. An empty tuple leaves the value open."""
    published: ClassVar[tuple[PublishedChains, ...]] = ()
    """Figures of others, which results are shown beside."""
    chain_length: ClassVar[int] = 1
    """Subtasks of an episode, see `chain`."""
    seeds: ClassVar[int | None] = None
    """Number of official initial states per task (seed n is state n), where all have as many; see `initial_states`."""

    @classmethod
    @abstractmethod
    def tasks(cls, options: Mapping[str, Any]) -> tuple[Task, ...]:
        """All tasks, in the benchmark's own order; `options` as `resolved_options` gives them."""

    @classmethod
    def splits(cls) -> Mapping[str, Sequence[str]]:
        """Named groups of tasks, e.g. {"ML10/test": (...)}; a config may name one in the place of a task."""
        return {}

    @classmethod
    def groups(cls) -> Mapping[str, Sequence[str]]:
        """Groups of tasks whose rates are never pooled with each other's, in order; none: all tasks are one group."""
        return {}

    @classmethod
    def initial_states(cls, task: str, options: Mapping[str, Any]) -> int | None:
        """Number of a task's official initial states: seed n is state n. None: any seed is one.

        Args:
            task: its name.
            options: as `resolved_options` gives them.
        """
        del task, options
        return cls.seeds

    @classmethod
    def check_view(cls, view: View) -> str | None:
        """Says why a view cannot be rendered, or returns None; camera names are checked by the caller."""
        return None

    @classmethod
    def expert_can(cls, task: str) -> bool:
        """Whether the script can do a task; without more said, that of a benchmark with `has_expert` can do all."""
        del task
        return cls.has_expert

    def __init__(self, view: View, options: Mapping[str, Any]):
        """Builds the simulator; a subclass calls this first.

        Args:
            view: cameras and image size.
            options: as `resolved_options` gives them.

        Raises:
            ImportError: the simulator's packages are not installed.
            SimulatorError: it cannot run or render here; the message says why and what to do.
        """
        self.view = view
        self.given = options
        self._by_name = {task.name: task for task in self.tasks(options)}

    @abstractmethod
    def protocol(self) -> dict[str, Any]:
        """Everything that decides an outcome beside task and seed: versions, settling steps, renderer; JSON values."""

    def chain(self, task: str, seed: int) -> tuple[Task, ...]:
        """The subtasks of an episode in order; the task alone where a benchmark has no chains."""
        return (self._by_name[task],)

    @abstractmethod
    def reset(self, task: str, seed: int) -> NDArray[np.float32]:
        """Starts the episode of (task, seed).

        Returns:
            The state, (S,).
        """

    def initial_positions(self) -> Mapping[str, float]:
        """Positions of the episode's objects and goals right after `reset`: name and axis ("cube_x") to value.

        For the map of results by initial state alone; a policy never gets them. Looking changes nothing. Those of
        the object that matters most come first.
        """
        return {}

    def begin(self, index: int) -> None:
        """Asks for subtask `index` of the chain from here on; the scene stays as it is."""
        del index

    @abstractmethod
    def step(self, action: NDArray[np.float32]) -> Step:
        """Executes one action (A,), prepared by `action.prepared`."""

    @abstractmethod
    def render(self) -> dict[str, NDArray[np.uint8]]:
        """Renders the present state from every camera of the view: uint8 (H, W, 3), upright.

        A picture that is zero everywhere is taken for that of a lost rendering context.
        """

    def expert_action(self) -> NDArray[np.float32]:
        """The action (A,) of the benchmark's own script in the present state; see `has_expert`."""
        raise NotImplementedError(f"{self.name} has no expert")

    def close(self) -> None:
        """Frees the simulator; the instance is of no use afterwards."""
        return

    @classmethod
    def resolved_options(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options with their values.

        Raises:
            ValueError: an option is unknown or has another value than it may have.
        """
        resolved = {name: values[0] if values else None for name, values in cls.options.items()}
        for name, value in given.items():
            if name not in cls.options:
                raise ValueError(
                    f"{cls.name} has no option '{name}'; it has {', '.join(cls.options) or 'none'}"
                )
            values = cls.options[name]
            if values and value not in values:
                raise ValueError(f"{name} is {value!r}; {cls.name} takes {', '.join(map(repr, values))}")
            resolved[name] = value
        return resolved


@dataclass(frozen=True)
class Registration:
    """Place of a benchmark's class, and how its packages get onto a machine."""

    where: str
    """module:Class."""
    extra: str | None = None
    """Extra of this project's package that holds its simulator, where that fits beside ours."""
    environment: str | None = None
    """Name of environments/<name>.txt: packages for an interpreter of its own, where they do not."""
    needs: tuple[str, ...] = field(default=())
    """Modules whose absence means that it is not installed."""
