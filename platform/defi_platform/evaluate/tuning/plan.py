"""Prediction of an evaluation's duration from measured parts; arithmetic only.

A worker's cycle is one chunk: a picture, the answer of the policy, the steps of the chunk. Cycles of several workers
overlap until the simulators, the policy, or the CPUs that both run on are used up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Simulation:
    """Measured speed of so many simulators at once; seconds are means of one simulator."""

    workers: int
    chunk_s: float
    """Picture, and the steps of one chunk."""
    episode_s: float
    """Start of an episode, and its video."""
    steps_per_s: tuple[float, ...]
    """Of all together, one value per turn; starts of episodes included."""


@dataclass(frozen=True)
class Answers:
    """Measured speed of the served policy with so many clients at once."""

    clients: int
    latency_s: float
    chunks_per_s: tuple[float, ...]
    """Of all together, one value per turn."""
    batch: float
    """Observations per forward pass, on average; 0 where the server does not say."""

    @property
    def mean(self) -> float:
        """Chunks per second."""
        return sum(self.chunks_per_s) / len(self.chunks_per_s)


@dataclass(frozen=True)
class Machine:
    """Resources that simulators and replicas share."""

    cpus: float
    replicas: int
    """That were served while it was measured."""
    replica_cpus: float
    """CPUs that one replica's forward pass keeps busy; 0 where it runs on a GPU or elsewhere."""


@dataclass(frozen=True)
class Extent:
    """Size of the evaluation."""

    episodes: dict[str, int]
    """Of each arm."""
    steps: float
    """Per episode."""
    chunk_steps: int
    """Executed of each chunk."""


@dataclass(frozen=True)
class Prediction:
    """An evaluation with so many workers and replicas."""

    workers: int
    replicas: int
    chunks_per_s: float
    cycle_s: float
    """Of one worker, from chunk to chunk."""
    bound: str
    """What holds it back: "simulators", "policy" or "shared CPUs"."""
    hours: float


def best_answers(answers: list[Answers]) -> Answers:
    """The fewest clients that get nearly (95 %) the most chunks per second."""
    most = max(one.mean for one in answers)
    return next(one for one in sorted(answers, key=lambda one: one.clients) if one.mean >= 0.95 * most)


def predict(
    simulation: Simulation, answers: list[Answers], machine: Machine, extent: Extent, replicas: int
) -> Prediction:
    """Predicts an evaluation with the workers of a measurement.

    Args:
        simulation: of that many workers.
        answers: of the policy; empty where no arm asks it.
        machine: that both run on.
        extent: what is to be run.
        replicas: of the policy.
    """
    workers, rates = simulation.workers, dict[str, float]()
    wait_s = 0.0
    if answers:
        alone, best = min(answers, key=lambda one: one.clients), best_answers(answers)
        wait_s = alone.latency_s
        one_replica = best.mean / machine.replicas
        rates["policy"] = one_replica * replicas
        if machine.replica_cpus:
            # Seconds of CPU per chunk: a simulator keeps one busy, a replica its own while it is at its best.
            rates["shared CPUs"] = machine.cpus / (simulation.chunk_s + machine.replica_cpus / one_replica)
    rates["simulators"] = workers / (simulation.chunk_s + wait_s)
    bound = min(rates, key=lambda name: rates[name])
    rate = rates[bound]
    seconds = 0.0
    for arm, episodes in extent.episodes.items():
        chunks = math.ceil(extent.steps / extent.chunk_steps)
        each = simulation.episode_s / workers
        each += chunks / rate if arm == "policy" else chunks * simulation.chunk_s / workers
        seconds += episodes * each
    return Prediction(workers, replicas, rate, workers / rate, bound, seconds / 3600)


def choose(predictions: list[Prediction]) -> Prediction:
    """The fewest workers, then the fewest replicas, within 5 % of the shortest duration."""
    shortest = min(one.hours for one in predictions)
    near = [one for one in predictions if one.hours <= 1.05 * shortest]
    return min(near, key=lambda one: (one.workers, one.replicas))
