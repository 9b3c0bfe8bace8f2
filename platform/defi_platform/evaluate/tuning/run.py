"""The tuning of an evaluation: measure the parts in turns, predict, check the prediction against a real evaluation."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import ray

from defi_platform import logs, roles, storage
from defi_platform.cluster import ray_session
from defi_platform.cluster.actors import kill_all
from defi_platform.config import EvaluateConfig, TuneConfig
from defi_platform.errors import ConfigError
from defi_platform.evaluate.asked import checked, first_seed, seeds
from defi_platform.evaluate.benchmarks.registry import benchmark_class
from defi_platform.evaluate.policy.fit import check_fits
from defi_platform.evaluate.policy.vla_eval import connect_policy
from defi_platform.evaluate.simulation.interpreter import check_installed
from defi_platform.evaluate.tuning.measure import MeasuredSimulator, Spent, ask
from defi_platform.evaluate.tuning.plan import (
    Answers,
    Extent,
    Machine,
    Prediction,
    Simulation,
    best_answers,
    choose,
    predict,
)
from defi_platform.storage.writable import check_writable

SUMMARY = "tuning/summary.json"
"""In the output."""
MOST_REPLICAS = 16


@dataclass(frozen=True)
class Check:
    """The prediction beside a real evaluation of a few episodes, seconds of one episode on average."""

    episodes: int
    steps: float
    predicted_s: float
    measured_s: float


@dataclass(frozen=True)
class Tuning:
    """The result; `<output>/tuning/summary.json` holds the same."""

    simulations: list[Simulation]
    answers: list[Answers]
    predictions: list[Prediction]
    chosen: Prediction
    half: float
    """Hours of the chosen prediction where episodes end after half of their horizon."""
    batch: int
    check: Check | None

    def summary(self) -> str:
        """Tables of the measurements, the choice and its check."""
        lines = [
            "workers  simulator steps/s (lowest-highest)   s per chunk   s per episode's start and video"
        ]
        lines += [
            f"{one.workers:7}  {np.mean(one.steps_per_s):8.1f} ({_range(one.steps_per_s)})"
            f"{one.chunk_s:22.3f}{one.episode_s:15.2f}"
            for one in self.simulations
        ]
        if self.answers:
            lines.append("clients  action chunks/s (lowest-highest)   batch   s per answer")
            lines += [
                f"{one.clients:7}  {one.mean:8.2f} ({_range(one.chunks_per_s)}){one.batch:16.1f}{one.latency_s:12.3f}"
                for one in self.answers
            ]
        best = self.chosen
        asks = f", serve.replicas={best.replicas}, serve.max_batch_size={self.batch}" if self.answers else ""
        lines.append(
            f"workers={best.workers}{asks}: at most {best.hours:.2f} h (every episode to its horizon), "
            f"{self.half:.2f} h at half of it; held back by {best.bound}"
        )
        if self.check:
            check = self.check
            off = 100 * (check.measured_s / check.predicted_s - 1)
            lines.append(
                f"checked by {check.episodes} real episodes of {check.steps:.0f} steps on average: {check.measured_s:.2f} s "
                f"each, {check.predicted_s:.2f} s predicted ({off:+.0f} %)"
            )
        return "\n".join(lines)


def tune(config: TuneConfig) -> Tuning:
    """Measures and predicts the evaluation that a config asks for.

    Raises:
        ConfigError: a setting cannot be, or the policy does not fit.
        ServeError: the policy cannot be served or does not answer.
        SimulatorError: the simulator cannot run.
    """
    _check_config(config)
    evaluation = checked(_evaluation(config))
    check_writable(config.output)
    check_installed(evaluation)
    if "policy" in evaluation.arms and config.url:
        with connect_policy(config.url, config.token_file, reconnect_s=0) as client:
            check_fits(evaluation, client.metadata, config.url)
    elif "policy" in evaluation.arms:
        # Imported here: where there is a url, no models are loaded.
        from defi_platform.serve.deployment.startup_checks import check_policy_folder

        check_policy_folder(config.serve.policy)
    with ray_session(config.ray), _served(evaluation) as (url, metadata):
        said = metadata.get("action", {}).get("execute_steps")
        chunk_steps = config.execute_steps or said or metadata.get("chunk") or 10
        free = max(1, int(ray.available_resources().get("CPU", 1)))
        counts = _counts(config.most_workers or free)
        worker: Any = ray.remote(num_cpus=1, **roles.options(roles.DECODE))(MeasuredSimulator)
        actors = [worker.remote(evaluation, chunk_steps) for _ in range(counts[-1])]
        simulations, answers = _measured(config, evaluation, actors, counts, url)
        kill_all(actors)
        machine = _machine(config, url)
        extent = _extent(evaluation, chunk_steps)
        found = [
            predict(simulation, answers, machine, extent, replicas)
            for simulation in simulations
            for replicas in (
                range(1, MOST_REPLICAS + 1) if answers and not config.url else [machine.replicas]
            )
        ]
        chosen = choose(found)
        simulation = next(one for one in simulations if one.workers == chosen.workers)
        shorter = replace(extent, steps=extent.steps / 2)
        half = predict(simulation, answers, machine, shorter, chosen.replicas).hours
        check = None
        if config.check_episodes:
            now = predict(simulation, answers, machine, extent, machine.replicas)
            check = _check(config, evaluation, url, now, simulation, chunk_steps)
        batch = min(best_answers(answers).clients, config.serve.max_batch_size) if answers else 0
        tuning = Tuning(simulations, answers, found, chosen, half, batch, check)
    storage.write_text(
        storage.join(storage.absolute(config.output), SUMMARY), json.dumps(asdict(tuning), indent=1)
    )
    return tuning


def _measured(
    config: TuneConfig,
    evaluation: EvaluateConfig,
    actors: list[Any],
    counts: list[int],
    url: str,
) -> tuple[list[Simulation], list[Answers]]:
    """Every number of workers and of clients, one after the other and that several times over."""
    task, seed, seconds = evaluation.tasks[0], first_seed(evaluation), config.measure_s
    logs.say(f"starting {len(actors)} simulators")
    observation = ray.get([actor.observation.remote(task, seed) for actor in actors])[0]
    ray.get([actor.measure.remote(task, seed, 0.5) for actor in actors])  # what only the first episode costs
    spent: dict[int, list[list[Spent]]] = {count: [] for count in counts}
    asked: dict[int, list[Answers]] = {count: [] for count in config.clients} if url else {}
    for turn in range(config.turns):
        logs.say(f"turn {turn + 1} of {config.turns}")
        for count in counts:
            spent[count].append(ray.get([a.measure.remote(task, seed, seconds) for a in actors[:count]]))
        for count in asked:
            asked[count].append(ask(url, config.token_file, observation, clients=count, seconds=seconds)[0])
    return (
        [_simulation(count, turns) for count, turns in spent.items()],
        [
            Answers(
                count,
                float(np.mean([one.latency_s for one in turns])),
                tuple(one.mean for one in turns),
                float(np.mean([one.batch for one in turns])),
            )
            for count, turns in asked.items()
        ],
    )


def _simulation(count: int, turns: list[list[Spent]]) -> Simulation:
    every = [one for turn in turns for one in turn]
    return Simulation(
        count,
        sum(one.chunk_s for one in every) / sum(one.chunks for one in every),
        sum(one.episode_s for one in every) / sum(one.episodes for one in every),
        tuple(sum(one.steps / one.wall_s for one in turn) for turn in turns),
    )


def _check(
    config: TuneConfig,
    evaluation: EvaluateConfig,
    url: str,
    prediction: Prediction,
    simulation: Simulation,
    chunk_steps: int,
) -> Check:
    """Runs a few episodes for real, with as many workers as were chosen."""
    from defi_platform.evaluate.results.episodes import left_out, read_episodes
    from defi_platform.evaluate.rollouts import evaluate

    arm = "policy" if url else evaluation.arms[0]
    output = storage.join(storage.absolute(config.output), "tuning/check")
    storage.delete(output)  # of a tuning before: its episodes would not run again
    # One more of each worker, which starts its simulator and its connection: as in the measurements, it does not count.
    episodes = (1 + config.check_episodes) * prediction.workers
    benchmark = benchmark_class(evaluation.benchmark)
    most = benchmark.initial_states(evaluation.tasks[0], evaluation.options)
    last = first_seed(evaluation) + episodes if most is None else most
    small = replace(
        evaluation,
        url=url or None,
        tasks=evaluation.tasks[:1],
        arms=[arm],
        episodes_per_task=min(episodes, last - first_seed(evaluation)),
        workers=prediction.workers,
        output=output,
    )
    evaluate(small)
    finished = [row for row in read_episodes(output) if not left_out(row)]
    rows = finished[min(prediction.workers, len(finished) - 1) :]
    cycle_s = prediction.cycle_s if arm == "policy" else simulation.chunk_s
    predicted = [simulation.episode_s + row["steps"] / chunk_steps * cycle_s for row in rows]
    return Check(
        len(rows),
        float(np.mean([row["steps"] for row in rows])),
        float(np.mean(predicted)),
        float(np.mean([row["wall_s"] for row in rows])),
    )


def _evaluation(config: TuneConfig) -> EvaluateConfig:
    return EvaluateConfig(**{one.name: getattr(config, one.name) for one in fields(EvaluateConfig)})


@contextlib.contextmanager
def _served(config: EvaluateConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (url, greeting) of the policy; both empty where no arm asks it."""
    if "policy" not in config.arms:
        yield "", {}
    elif config.url:
        with connect_policy(config.url, config.token_file, reconnect_s=0) as client:
            metadata = client.metadata
        check_fits(config, metadata, config.url)
        yield config.url, metadata
    else:
        # Imported here: where there is a url, no models are loaded.
        from defi_platform.serve.deployment.server import deploy

        with deploy(config.serve, guest=True) as server:
            check_fits(config, server.metadata, config.serve.policy)
            yield server.url, server.metadata


def _machine(config: TuneConfig, url: str) -> Machine:
    cpus = float(ray.cluster_resources().get("CPU", os.cpu_count() or 1))
    here = not url or urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    replicas = config.serve.replicas if isinstance(config.serve.replicas, int) and not config.url else 1
    on_cpus = here and not config.serve.replica_gpus
    return Machine(cpus, replicas, float(config.serve.threads or 1) if on_cpus else 0.0)


def _extent(config: EvaluateConfig, chunk_steps: int) -> Extent:
    every = benchmark_class(config.benchmark).tasks(config.options)
    horizons = {task.name: task.horizon for task in every}
    steps = [config.max_steps or horizons[name] for name in config.tasks]
    count = sum(len(seeds(config, task)) for task in config.tasks)
    return Extent(dict.fromkeys(config.arms, count), sum(steps) / len(steps), chunk_steps)


def _counts(most: int) -> list[int]:
    """1, 2, 4 and so on, and the most."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def _range(values: tuple[float, ...]) -> str:
    return f"{min(values):.1f}-{max(values):.1f}"


def _check_config(config: TuneConfig) -> None:
    if not 0 < config.measure_s < math.inf or config.turns < 1 or config.check_episodes < 0:
        raise ConfigError(
            f"measure_s is {config.measure_s}, turns {config.turns}, check_episodes {config.check_episodes}; they must be "
            "more than 0, 1 or more, and 0 or more."
        )
    if config.most_workers is not None and config.most_workers < 1:
        raise ConfigError(f"most_workers is {config.most_workers}; it must be 1 or more.")
    if not config.clients or min(config.clients) < 1:
        raise ConfigError(f"clients is {config.clients}; name at least one number from 1 on.")
