"""One episode: a simulator's process on one side, a policy under test on the other, a row of results at the end."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from defi_client.recording.h264 import encode_h264
from defi_platform.errors import ServeError
from defi_platform.evaluate.benchmarks.interface import FIRST, LAST, ActionSpec, Observation, Task
from defi_platform.evaluate.policy.observation import policy_observation
from defi_platform.evaluate.policy_client import PolicyClient, check_same_inference, check_same_policy
from defi_platform.evaluate.simulation.process import Advance, SimulatorProcess
from defi_platform.serve.observation_keys import OWN, ObservationKeys

_STRIDE = 50
"""Steps per call of arms that look at no pictures."""


@dataclass(frozen=True)
class Rollout:
    """One episode to run."""

    arm: str
    task: str
    seed: int


@dataclass(frozen=True)
class Outcome:
    """The result of a rollout."""

    row: dict[str, Any]
    """JSON values: benchmark, arm, task, seed, success, solved (subtasks in a
    row), subtasks [{name, instruction, success, steps}], steps, reward, wall_s, latency_ms (one per request of the
    policy), instructions [{step, text}] that came during a subtask, simulator_errors [{kind, message, place}],
    initial_state, initial_positions [{name, value}] of objects and goals, policy_digest, host."""
    video: bytes
    """MP4; empty when no frames were asked for."""
    steps: dict[str, NDArray[Any]] = field(default_factory=dict)
    """n entries each: step, subtask, observation_sha256 (hex; empty between requests), action (n, A) as the policy
    gave it, executed (n, A), reward, success (of the subtask, in the state after the step)."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """Of the benchmark, where the episode ran."""


class Scene:
    """An episode as it stands: the subtask asked for, the state, the steps so far, the frames of the video."""

    def __init__(self, simulator: SimulatorProcess, rollout: Rollout, frame_every: int):
        """Starts the episode.

        Args:
            simulator: where it takes place.
            rollout: task and seed.
            frame_every: steps per frame of the video; 0 for no video.
        """
        self.simulator = simulator
        self.frame_every = frame_every
        self.chain, self.state = simulator.reset(rollout.task, rollout.seed)
        self.initial_state = self.state
        self.initial_positions = simulator.initial_positions
        self.index = 0
        self.step = 0
        self.success = self.done = False
        """Of the last step."""
        self.instruction = ""
        """The text of the moment."""
        self.changes: list[dict[str, Any]] = []
        """Texts that came during a subtask, with the number of the first step under each: [{step, text}]."""
        self.frames: list[NDArray[np.uint8]] = []
        self.columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        self._sent = ""

    @property
    def subtask(self) -> Task:
        """The one asked for."""
        return self.chain[self.index]

    def begin(self, index: int) -> None:
        """Asks for a subtask."""
        self.index, self.success = index, False
        self.instruction = self.subtask.instruction
        self.simulator.begin(index)

    @property
    def over(self) -> bool:
        """The subtask, or the episode, has ended before its horizon."""
        return self.done or (self.success and self.subtask.decided == FIRST)

    def observe(self) -> Observation:
        """Pictures and state, for a policy."""
        return self.simulator.observe(self.state)

    def sent(self, observation: Mapping[str, Any]) -> None:
        """Notes that a policy was asked with this observation."""
        digest = hashlib.sha256()
        for key in sorted(observation):
            value = observation[key]
            digest.update(key.encode() + b"\0")
            digest.update(value.tobytes() if isinstance(value, np.ndarray) else str(value).encode())
        self._sent = digest.hexdigest()

    def advance(self, actions: NDArray[np.floating]) -> None:
        """Executes a chunk of actions, (K, A), until the subtask is over or its instruction changes."""
        did = self.simulator.advance(
            actions, first_step=self.step, frame_every=self.frame_every, through=self._through
        )
        self._note(did, actions)

    def follow_expert(self, count: int) -> None:
        """Lets the benchmark's script act for `count` steps, or until the subtask is over or its instruction changes."""
        did = self.simulator.expert(
            count, first_step=self.step, frame_every=self.frame_every, through=self._through
        )
        self._note(did, did.proposed)

    def video(self, control_hz: float) -> bytes:
        """The frames so far and the present picture, cameras side by side; empty without frames.

        Args:
            control_hz: steps per second of the benchmark.
        """
        if not self.frame_every:
            return b""
        # How it ended is what one wants to see.
        last = _side_by_side(self.observe().images)
        return encode_h264([*self.frames, last], max(1, round(control_hz / self.frame_every)))

    def table(self) -> dict[str, NDArray[Any]]:
        """See `Outcome.steps`."""
        return {name: np.array(values, _COLUMNS[name]) for name, values in self.columns.items()}

    @property
    def _through(self) -> bool:
        return self.subtask.decided == LAST

    def _note(self, did: Advance, actions: NDArray[np.floating]) -> None:
        self.frames += map(_side_by_side, did.frames)
        for step, action, executed in zip(did.steps, actions, did.executed, strict=False):
            row = (self.step, self.index, self._sent, action, executed, step.reward, step.success)
            for name, value in zip(_COLUMNS, row, strict=True):
                self.columns[name].append(value)
            self._sent = ""
            self.step += 1
        self.state = did.steps[-1].state
        self.success, self.done = did.steps[-1].success, did.steps[-1].done
        if (text := did.steps[-1].instruction) is not None and text != self.instruction:
            self.instruction = text
            self.changes.append({"step": self.step, "text": text})


_COLUMNS: dict[str, Any] = {
    "step": np.int32,
    "subtask": np.int32,
    "observation_sha256": np.str_,
    "action": np.float32,
    "executed": np.float32,
    "reward": np.float64,
    "success": np.bool_,
}


class Arm(Protocol):
    """A policy under test."""

    latency_ms: list[float]
    """Of its requests."""

    def act(self, scene: Scene, most: int) -> None:
        """Acts for one chunk of `most` steps or fewer."""


class RandomPolicy:
    """Uniform actions within the benchmark's bounds."""

    def __init__(self, rollout: Rollout, action: ActionSpec):
        """Seeds it with the episode.

        Args:
            rollout: the episode.
            action: the benchmark's action space.
        """
        self.latency_ms: list[float] = []
        self._action = action
        self._random = np.random.default_rng([rollout.seed, *rollout.task.encode()])

    def act(self, scene: Scene, most: int) -> None:
        """Draws an action per step."""
        count = min(most, _STRIDE)
        scene.advance(self._random.uniform(self._action.low, self._action.high, (count, self._action.dim)))


class Expert:
    """The benchmark's script, which knows the position of every object."""

    def __init__(self) -> None:
        self.latency_ms: list[float] = []

    def act(self, scene: Scene, most: int) -> None:
        """Follows the script."""
        scene.follow_expert(min(most, _STRIDE))


class ServedPolicy:
    """The served policy: requests a chunk, executes its first `execute_steps` actions, requests the next."""

    def __init__(
        self,
        client: PolicyClient,
        rollout: Rollout,
        *,
        action: ActionSpec,
        keys: ObservationKeys = OWN,
        cameras: Mapping[str, str],
        execute_steps: int | None,
        greeting: Mapping[str, Any],
    ):
        """Prepares an episode's requests.

        Args:
            client: connection to the server.
            rollout: the episode.
            action: the benchmark's action space.
            keys: under which the server expects an observation's parts.
            cameras: camera of the benchmark -> name by which the policy knows it.
            execute_steps: actions executed of each chunk; None for all.
            greeting: of the policy that is evaluated; what it says of digest and inference is to stay.
        """
        self.latency_ms: list[float] = []
        self._client = client
        self._rollout = rollout
        self._action = action
        self._keys = keys
        self._cameras = cameras
        self._execute_steps = execute_steps
        self._greeting = greeting
        self._asked: tuple[int, str] | None = None

    def act(self, scene: Scene, most: int) -> None:
        """Asks for a chunk and executes it.

        Raises:
            ServeError: there is no answer, one of another policy, or one of another action space.
        """
        asked = scene.index, scene.instruction
        if asked != self._asked:  # a policy starts afresh with every instruction
            self._client.begin_episode(scene.subtask.name)
            self._asked = asked
        seen = scene.observe()
        observation = policy_observation(
            self._keys,
            {self._cameras.get(camera, camera): image for camera, image in seen.images.items()},
            seen.state,
            prompt=scene.instruction,
            seed=request_seed(self._rollout.seed, self._rollout.task, scene.step),
        )
        start = time.perf_counter()
        actions, answer = self._client.infer(observation)
        self.latency_ms.append((time.perf_counter() - start) * 1e3)
        url, inference = self._client.url, self._client.metadata.get("inference")
        check_same_policy(self._greeting.get("policy_digest"), answer.get("policy_digest"), url)
        check_same_inference(self._greeting.get("inference"), inference, url)
        if actions.shape[1] != self._action.dim:
            raise ServeError(
                f"the policy server at {self._client.url} gives {actions.shape[1]} action dims, "
                f"{scene.simulator.benchmark} takes {self._action.dim} ({', '.join(self._action.names)})."
            )
        scene.sent(observation)
        scene.advance(actions[: self._execute_steps][:most])


def run_episode(
    simulator: SimulatorProcess,
    arm: Arm,
    rollout: Rollout,
    *,
    max_steps: int | None,
    frame_every: int,
    control_hz: float,
) -> Outcome:
    """Runs one episode: its subtasks in order, until one of them fails.

    Args:
        simulator: where it takes place.
        arm: the policy under test.
        rollout: task and seed.
        max_steps: of a subtask; None for the benchmark's own horizon.
        frame_every: steps per frame of the video; 0 for no video.
        control_hz: steps per second of the benchmark, by which the video plays.

    Raises:
        SimulatorFault: the simulator broke; another process may run the episode.
        ServeError: the policy does not answer, or another one does.
    """
    start = time.perf_counter()
    scene = Scene(simulator, rollout, frame_every)
    subtasks: list[dict[str, Any]] = []
    for index, subtask in enumerate(scene.chain):
        scene.begin(index)
        first = scene.step
        end = first + (max_steps or subtask.horizon)
        while not scene.over and scene.step < end:
            arm.act(scene, end - scene.step)
        subtasks.append(
            {
                "name": subtask.name,
                "instruction": subtask.instruction,
                "success": scene.success,
                "steps": scene.step - first,
            }
        )
        if not scene.success or scene.done:
            break
    video = scene.video(control_hz)
    solved = sum(part["success"] for part in subtasks)
    row = {
        "benchmark": simulator.benchmark,
        "arm": rollout.arm,
        "task": rollout.task,
        "seed": rollout.seed,
        "success": solved == len(scene.chain),
        "solved": solved,
        "subtasks": subtasks,
        "steps": scene.step,
        "reward": float(np.sum(scene.columns["reward"])),
        "wall_s": round(time.perf_counter() - start, 3),
        "latency_ms": [round(ms, 2) for ms in arm.latency_ms],
        "instructions": scene.changes,
        "simulator_errors": [],
        "initial_state": [float(value) for value in scene.initial_state],
        "initial_positions": [
            {"name": name, "value": value} for name, value in scene.initial_positions.items()
        ],
        "policy_digest": None,
        "host": socket.gethostname(),
    }
    return Outcome(row, video, scene.table())


def request_seed(seed: int, task: str, step: int) -> int:
    """The noise seed of one request: the same in every run, different for every request.

    Args:
        seed: of the episode.
        task: of the episode.
        step: of the episode, at which the request is sent.

    Returns:
        An integer in [0, 2**31).
    """
    digest = hashlib.sha256(f"{seed}/{task}/{step}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _side_by_side(images: Mapping[str, NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """One picture of all cameras; black below those that are less high than others."""
    highest = max(len(image) for image in images.values())
    return np.concatenate(
        [np.pad(image, ((0, highest - len(image)), (0, 0), (0, 0))) for image in images.values()], axis=1
    )
