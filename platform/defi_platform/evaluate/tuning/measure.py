"""Measurements: simulators side by side as rollout workers, and clients side by side at the served policy."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from defi_platform.config import EvaluateConfig
from defi_platform.evaluate.episode import Rollout, Scene
from defi_platform.evaluate.policy.observation import client_keys, policy_observation
from defi_platform.evaluate.policy.vla_eval import connect_policy
from defi_platform.evaluate.simulator import Simulator
from defi_platform.evaluate.tuning.plan import Answers

_WARM_UP = 2
"""Requests of each client before its time counts."""


@dataclass
class Spent:
    """Work of one simulator in its time."""

    episodes: int = 0
    episode_s: float = 0.0
    """Starts of episodes and their videos."""
    chunks: int = 0
    chunk_s: float = 0.0
    """Pictures and steps."""
    steps: int = 0
    wall_s: float = 0.0


class MeasuredSimulator(Simulator):
    """A rollout worker without a policy: random chunks, as long as it is asked to; a Ray actor."""

    def __init__(self, config: EvaluateConfig, chunk_steps: int):
        """Prepares a worker.

        Args:
            config: of the evaluation, checked.
            chunk_steps: executed of each chunk.
        """
        super().__init__(config, "")
        self._chunk_steps = chunk_steps

    def observation(self, task: str, seed: int) -> dict[str, Any]:
        """Observation at the start of an episode, as the policy gets it; starts the simulator.

        Args:
            task: of the episode.
            seed: of the episode.
        """
        scene = Scene(self._simulator(), Rollout("random", task, seed), 0)
        scene.begin(0)
        seen, names = scene.observe(), self._config.policy_cameras
        return policy_observation(
            client_keys(self._config.observation_keys),
            {names.get(camera, camera): np.array(image) for camera, image in seen.images.items()},
            seen.state,
            prompt=scene.subtask.instruction,
            seed=seed,
        )

    def measure(self, task: str, seed: int, seconds: float) -> Spent:
        """Runs episodes of random chunks, each to its horizon, and stops when the time is over.

        Args:
            task: of the episodes.
            seed: of the first one.
            seconds: of the measurement.
        """
        process, action, spent = self._simulator(), self._benchmark.action, Spent()
        random = np.random.default_rng(seed)
        begun = time.perf_counter()
        while time.perf_counter() < begun + seconds:
            start = time.perf_counter()
            scene = Scene(process, Rollout("random", task, seed + spent.episodes), self._config.video_every)
            scene.begin(0)
            spent.episode_s += time.perf_counter() - start
            end = self._config.max_steps or scene.subtask.horizon
            while scene.step < end and not scene.over:
                start = time.perf_counter()
                scene.observe()
                scene.advance(random.uniform(action.low, action.high, (self._chunk_steps, action.dim)))
                spent.chunk_s += time.perf_counter() - start
                spent.chunks += 1
                if time.perf_counter() > begun + seconds:
                    break
            start = time.perf_counter()
            scene.video(self._benchmark.control_hz)
            spent.episode_s += time.perf_counter() - start
            spent.steps += scene.step
            spent.episodes += 1
        spent.wall_s = time.perf_counter() - begun
        return spent


def ask(
    url: str, token_file: str | None, observation: dict[str, Any], *, clients: int, seconds: float
) -> tuple[Answers, int]:
    """Lets clients ask a served policy all the time.

    Args:
        url: of the server.
        token_file: file with the token that it asks for.
        observation: that every client sends, with seeds of its own.
        clients: at once.
        seconds: of the measurement.

    Returns:
        Their answers, and the length of a chunk.

    Raises:
        ServeError: the policy does not answer.
    """
    ready, latencies, batches = threading.Barrier(clients), list[float](), list[float]()
    ended, errors, chunk = list[float](), list[Exception](), [0]
    begun = [0.0]

    def work(number: int) -> None:
        try:
            with connect_policy(url, token_file) as client:
                for turn in range(_WARM_UP):
                    client.infer({**observation, "seed": 1000 * number + turn})
                ready.wait(60)
                begun[0] = begun[0] or time.perf_counter()
                seed = 1000 * number
                while (start := time.perf_counter()) < begun[0] + seconds:
                    seed += 1
                    actions, answer = client.infer({**observation, "seed": seed})
                    latencies.append(time.perf_counter() - start)
                    batches.append(float(answer.get("server_timing", {}).get("batch_size", 0)))
                    chunk[0] = len(actions)
                ended.append(time.perf_counter())
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)
            ready.abort()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next(
            (error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0]
        )
    rate = len(latencies) / (max(ended) - begun[0])
    return Answers(clients, float(np.mean(latencies)), (rate,), float(np.mean(batches))), chunk[0]
