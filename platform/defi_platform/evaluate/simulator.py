"""The simulator worker: runs an episode with the actions of a policy under test and reports its outcome."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_platform.config import EvaluateConfig
from defi_platform.data.writers.h264 import encode_h264
from defi_platform.evaluate.benchmarks import metaworld
from defi_platform.evaluate.policy_client import PolicyClient, check_same_policy, read_token

ARMS = ("policy", "random", "expert")
"""The policies that can be put to the test."""


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
    """arm, task, seed, success, steps, wall_s, latency_ms (one per request of the policy)."""
    video: bytes
    """MP4; empty when `video_every` is 0."""


class Simulator:
    """Runs rollouts one after the other; a Ray actor when evaluating."""

    def __init__(self, config: EvaluateConfig, url: str, policy_digest: str | None = None):
        """Prepares a worker; environment and connection are made when the first rollout needs them.

        Args:
            config: of the evaluation.
            url: of the policy server; only the "policy" arm calls it.
            policy_digest: of the policy that is evaluated; None where its server names none.
        """
        self._config = config
        self._url = url
        self._policy_digest = policy_digest
        self._environment: metaworld.Environment | None = None
        self._client: PolicyClient | None = None

    def ready(self) -> None:
        """Returns once the process is up."""

    def work(self, rollout: Rollout) -> Outcome:
        """Runs one episode to success or max_steps.

        Raises:
            SimulatorError: the simulator cannot run here.
            ServeError: the policy does not answer, or another one does.
        """
        config, start = self._config, time.perf_counter()
        scene = _Scene(self._environment_of(rollout.task), rollout.seed)
        actor = self._actor(rollout)
        frames: list[NDArray[np.uint8]] = []
        success = False
        while not success and scene.step < config.max_steps:
            if config.video_every and scene.step % config.video_every == 0:
                frames.append(scene.image())
            success = scene.advance(actor.action(scene))
        video = b""
        if config.video_every:
            frames.append(scene.image())  # how it ended is what one wants to see
            video = encode_h264(frames, max(1, round(metaworld.FPS / config.video_every)))
        row = {
            "arm": rollout.arm,
            "task": rollout.task,
            "seed": rollout.seed,
            "success": success,
            "steps": scene.step,
            "wall_s": round(time.perf_counter() - start, 3),
            "latency_ms": [round(ms, 2) for ms in actor.latency_ms],
        }
        if rollout.arm == "policy":
            row["policy_digest"] = self._policy_digest
        return Outcome(row, video)

    def _environment_of(self, task: str) -> metaworld.Environment:
        if self._environment is None or self._environment.task != task:
            if self._environment is not None:
                self._environment.close()
            config = self._config
            self._environment = metaworld.Environment(task, config.camera, config.height, config.width)
        return self._environment

    def _actor(self, rollout: Rollout) -> _ServedPolicy | _RandomPolicy | _Expert:
        if rollout.arm == "random":
            return _RandomPolicy(rollout)
        if rollout.arm == "expert":
            return _Expert()
        if self._client is None:
            self._client = PolicyClient(self._url, token=read_token(self._config.token_file))
        # Without a setting of its own, the evaluation does as the policy says that robots should.
        asked = self._config.execute_steps or self._client.metadata.get("action", {}).get("execute_steps")
        return _ServedPolicy(self._client, rollout, self._config.camera, asked, self._policy_digest)


class _Scene:
    """An episode as it stands: step number, state, and the image, rendered at most once per step."""

    def __init__(self, environment: metaworld.Environment, seed: int):
        self.environment = environment
        self.state = environment.reset(seed)
        self.step = 0
        self._image: NDArray[np.uint8] | None = None

    def advance(self, action: NDArray[np.floating]) -> bool:
        """Executes an action.

        Returns:
            Whether the task is solved.
        """
        self.state, success = self.environment.step(action)
        self.step += 1
        self._image = None
        return success

    def image(self) -> NDArray[np.uint8]:
        if self._image is None:
            self._image = self.environment.render()
        return self._image


class _RandomPolicy:
    """Uniform actions in [-1, 1]."""

    def __init__(self, rollout: Rollout):
        self.latency_ms: list[float] = []
        self._random = np.random.default_rng([rollout.seed, *rollout.task.encode()])

    def action(self, scene: _Scene) -> NDArray[np.floating]:
        return self._random.uniform(-1.0, 1.0, metaworld.ACTION_DIM)


class _Expert:
    """Meta-World's script, which knows the position of every object."""

    def __init__(self) -> None:
        self.latency_ms: list[float] = []

    def action(self, scene: _Scene) -> NDArray[np.floating]:
        return scene.environment.expert_action()


class _ServedPolicy:
    """The served policy: requests a chunk, executes its first `execute_steps` actions, requests the next."""

    def __init__(
        self,
        client: PolicyClient,
        rollout: Rollout,
        camera: str,
        execute_steps: int | None,
        digest: str | None,
    ):
        self.latency_ms: list[float] = []
        self._client = client
        self._rollout = rollout
        self._camera = camera
        self._execute_steps = execute_steps
        self._digest = digest
        self._queue: list[NDArray[np.floating]] = []

    def action(self, scene: _Scene) -> NDArray[np.floating]:
        if not self._queue:
            observation = {
                f"observation/images/{self._camera}": scene.image(),
                "observation/state": scene.state,
                "prompt": scene.environment.instruction,
                "seed": request_seed(self._rollout.seed, self._rollout.task, scene.step),
            }
            start = time.perf_counter()
            actions, answer = self._client.infer(observation)
            check_same_policy(self._digest, answer.get("policy_digest"), self._client.url)
            self.latency_ms.append((time.perf_counter() - start) * 1e3)
            self._queue = list(actions[: self._execute_steps])
        return self._queue.pop(0)


def request_seed(seed: int, task: str, step: int) -> int:
    """The noise seed of one request: the same in every run, different for every request.

    Args:
        seed: of the episode.
        task: of the episode.
        step: at which the request is sent.

    Returns:
        An integer in [0, 2**31).
    """
    digest = hashlib.sha256(f"{seed}/{task}/{step}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
