"""Closed-loop evaluation: simulator workers against a served policy, a random one and the expert.

Every policy under test starts from the same seeded initial states. The policy is not in this process: workers send it
observations over the websocket protocol a robot would use. An episode is one file, named by (arm, task,
seed), written when it is over: an interrupted evaluation resumes, and a lost episode is run again.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray

from defi_platform import roles, storage
from defi_platform.cluster import ray_session
from defi_platform.cluster.run_registry import register_run
from defi_platform.config import EvaluateConfig
from defi_platform.config.loader import to_mapping
from defi_platform.errors import ConfigError, SimulatorError
from defi_platform.evaluate.actor_pool import ActorPool
from defi_platform.evaluate.benchmarks.interface import View
from defi_platform.evaluate.benchmarks.registry import (
    benchmark_class,
    selected_options,
    selected_tasks,
    selected_view,
)
from defi_platform.evaluate.episode import Outcome, Rollout
from defi_platform.evaluate.policy_client import PolicyClient, check_metadata, check_same_policy, read_token
from defi_platform.evaluate.resume_guard import bind_settings, ensure_same_settings
from defi_platform.evaluate.simulator import ARMS, Simulator
from defi_platform.evaluate.statistics.intervals import Rate, latency_quantiles, wilson
from defi_platform.evaluate.success_table import success_lines
from defi_platform.metrics import catalogue
from defi_platform.progress import Progress

SUMMARY = "summary.json"
RESULTS = "results.jsonl"
_EPISODES = "episodes"


@dataclass(frozen=True)
class EvaluationResult:
    """The result of an evaluation; `<output>/summary.json` holds the same."""

    output: str
    details: dict[str, Any]
    """arms {arm: {tasks {task: rate}, pooled rate}}, latency_ms, example_episodes, settings, wall_s."""
    reused: bool = False

    def summary(self) -> str:
        """A table of success rates with 95 % intervals."""
        lines = success_lines(self.details["arms"])
        latency = self.details["latency_ms"]
        if latency["count"]:
            lines.append(
                f"latency of {latency['count']} requests: p50 {latency['p50']:.0f} ms, "
                f"p95 {latency['p95']:.0f} ms"
            )
        state = "evaluated before, reused" if self.reused else f"{self.details['wall_s']:.0f} s"
        return "\n".join([*lines, f"{self.output} ({state})"])


def evaluate(config: EvaluateConfig) -> EvaluationResult:
    """Runs the rollouts that `config` asks for and that are not there yet; serves the policy if need be.

    Raises:
        ConfigError: the benchmark, a task, arm or camera is unknown, the policy does not fit, or the output holds another
            evaluation.
        CheckpointError: the policy folder is not complete.
        ServeError: the policy cannot be served or does not answer.
        SimulatorError: the simulator cannot run, or fails in one episode again and again.
    """
    config = _checked(config)
    start = time.monotonic()
    output = storage.absolute(config.output)
    settings = _settings(config)
    asked = {
        "tasks": list(config.tasks),
        "arms": list(config.arms),
        "episodes_per_task": config.episodes_per_task,
    }
    finished = storage.join(output, SUMMARY)
    if storage.exists(finished):
        details = json.loads(storage.read_text(finished))
        ensure_same_settings(settings, details["settings"], "an evaluation", output)
        if details["asked"] == asked:
            return EvaluationResult(output, details, reused=True)
        storage.delete(finished)  # more is asked for now: it is whole again when that is done
    bind_settings(storage.join(output, _EPISODES), settings, "an evaluation", output)
    episodes = _EpisodeStore(output)
    served: dict[str, Any] = {}
    with ray_session(config.ray):
        register_run(output)
        missing = [unit for unit in _units(config) if unit not in episodes.rows]
        if missing:
            with _policy(config, missing) as (url, served):
                digest = served.get("policy_digest")
                for row in episodes.rows.values():
                    check_same_policy(digest, row.get("policy_digest"), url)
                _run(config, url, digest, missing, episodes)
    details = {
        **_scores(config, [episodes.rows[unit] for unit in _units(config)]),
        "policy": served,
        "asked": asked,
        "settings": settings,
        "skipped": {},
        "wall_s": round(time.monotonic() - start, 1),
    }
    rows = (json.dumps(episodes.rows[unit]) + "\n" for unit in _units(config))
    storage.write_text(storage.join(output, RESULTS), "".join(rows))
    storage.write_text(finished, json.dumps(details, indent=1))
    return EvaluationResult(output, details)


# --------------------------------------------------------------------------- running


def _units(config: EvaluateConfig) -> Iterator[Rollout]:
    """Every configured episode; the policies under test of one initial state next to each other."""
    for task in config.tasks:
        for offset in range(config.episodes_per_task):
            for arm in config.arms:
                yield Rollout(arm, task, config.seed + offset)


@contextlib.contextmanager
def _policy(config: EvaluateConfig, missing: list[Rollout]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (url, greeting) of the policy: the one at config.url, or one served here for the time being.

    Both are empty when none of the missing episodes needs it.
    """
    if not any(unit.arm == "policy" for unit in missing):
        yield "", {}
        return
    if config.url:
        with PolicyClient(config.url, reconnect_s=0, token=read_token(config.token_file)) as client:
            metadata = client.metadata
        _check_fits(config, metadata, config.url)
        yield config.url, metadata
        return
    # Imported here: a worker that needs only the simulator does not load the models.
    from defi_platform.serve.deployment.server import deploy

    print(f"serving {config.serve.policy}", flush=True)
    with deploy(config.serve, guest=True) as server:
        _check_fits(config, server.metadata, config.serve.policy)
        yield server.url, server.metadata


def _check_fits(config: EvaluateConfig, metadata: dict[str, Any], source: str) -> None:
    benchmark = benchmark_class(config.benchmark)
    check_metadata(
        metadata,
        source=source,
        benchmark=config.benchmark,
        cameras=[config.policy_cameras.get(camera, camera) for camera in config.cameras or ()],
        state_dim=len(benchmark.state_names),
        action_dim=benchmark.action.dim,
        execute_steps=config.execute_steps,
    )


def _run(
    config: EvaluateConfig, url: str, digest: str | None, missing: list[Rollout], episodes: _EpisodeStore
) -> None:
    worker: Any = ray.remote(num_cpus=1, **roles.options(roles.DECODE))(Simulator)
    pool: ActorPool[Rollout] = ActorPool(lambda: worker.remote(config, url, digest), config.workers)
    for unit in missing:
        pool.submit(unit)
    total = len(list(_units(config)))
    solved = dict.fromkeys(config.arms, 0)
    done = dict.fromkeys(config.arms, 0)
    with Progress("evaluate", "episodes", total, initial=total - len(missing)) as progress:
        for unit, outcome in pool.results():
            if outcome.row["success"] is None:
                last = outcome.row["simulator_errors"][-1]
                raise SimulatorError(
                    f"{unit}: the simulator failed {len(outcome.row['simulator_errors'])} times, the last: "
                    f"{last['kind']}: {last['message']}."
                )
            episodes.add(unit, outcome)
            _count(config.output, outcome.row)
            done[unit.arm] += 1
            solved[unit.arm] += outcome.row["success"]
            progress.step(note=" ".join(f"{arm} {solved[arm]}/{done[arm]}" for arm in config.arms))


def _count(run: str, row: dict[str, Any]) -> None:
    """Counts a finished episode in the metrics."""
    arm, outcome = row["arm"], "success" if row["success"] else "failure"
    catalogue.EVALUATE_EPISODES.add(run=run, arm=arm, outcome=outcome)
    catalogue.EVALUATE_STEPS.add(row["steps"], run=run, arm=arm)
    catalogue.EVALUATE_EPISODE_SECONDS.observe(row["wall_s"], run=run, arm=arm)
    for milliseconds in row["latency_ms"]:
        catalogue.EVALUATE_REQUEST_SECONDS.observe(milliseconds / 1000, run=run)


# --------------------------------------------------------------------------- the store of episodes


class _EpisodeStore:
    """The finished episodes of an evaluation: one JSON file each, and its video."""

    def __init__(self, output: str):
        self._output = output
        self.rows: dict[Rollout, dict[str, Any]] = {}
        folder = storage.join(output, _EPISODES)
        for name in storage.names(folder):
            if name.endswith(".json") and name.count("_") == 2:
                row = json.loads(storage.read_text(storage.join(folder, name)))
                self.rows[Rollout(row["arm"], row["task"], row["seed"])] = row

    def add(self, unit: Rollout, outcome: Outcome) -> None:
        """Stores an episode; the row comes last, so that a finished episode has its video."""
        row = dict(outcome.row)
        row["video"] = None
        if outcome.video:
            row["video"] = f"videos/{unit.arm}/{unit.task}/{unit.seed}.mp4"
            storage.write_bytes(storage.join(self._output, row["video"]), outcome.video)
        name = f"{unit.arm}_{unit.task}_{unit.seed}.json"
        storage.write_text(storage.join(self._output, _EPISODES, name), json.dumps(row))
        self.rows[unit] = row


def _scores(config: EvaluateConfig, rows: list[dict[str, Any]]) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    for arm in config.arms:
        of_arm = [row for row in rows if row["arm"] == arm]
        tasks = {task: _rate([row for row in of_arm if row["task"] == task]) for task in config.tasks}
        arms[arm] = {
            "tasks": {task: rate.as_mapping() for task, rate in tasks.items()},
            "pooled": _rate(of_arm).as_mapping(),
        }
    examples = [
        {key: row[key] for key in ("arm", "task", "seed", "success", "steps", "video")}
        for row in rows
        if row["seed"] == config.seed and row["video"]
    ]
    return {
        "arms": arms,
        "latency_ms": latency_quantiles([ms for row in rows for ms in row["latency_ms"]]),
        "example_episodes": examples,
    }


def _rate(rows: list[dict[str, Any]]) -> Rate:
    return wilson(sum(row["success"] for row in rows), len(rows))


# --------------------------------------------------------------------------- checks


def _settings(config: EvaluateConfig) -> dict[str, Any]:
    """The settings that decide an episode's outcome besides (arm, task, seed), the policy's content included."""
    not_deciding = (
        "ray",
        "serve",
        "token_file",
        "simulator",
        "workers",
        "output",
        "tasks",
        "arms",
        "episodes_per_task",
        "cameras",
        "height",
        "width",
    )
    settings = {key: value for key, value in to_mapping(config).items() if key not in not_deciding}
    view = _view(config)
    settings["view"] = {camera: list(view.size(camera)) for camera in view.cameras}
    if "policy" in config.arms and not config.url:
        folder = storage.absolute(config.serve.policy)
        if storage.is_folder(folder):  # if not, serving it says what is wrong
            settings["policy"] = {entry.name: entry.version for entry in storage.walk(folder)}
    return settings


def _checked(config: EvaluateConfig) -> EvaluateConfig:
    """The config with every task, option and the view named."""
    benchmark = benchmark_class(config.benchmark)
    options = selected_options(benchmark, config.options)
    tasks = selected_tasks(benchmark, options, config.tasks)
    view = _view(config)
    unknown = [arm for arm in config.arms if arm not in ARMS]
    if unknown or not config.arms or len(set(config.arms)) < len(config.arms):
        raise ConfigError(f"arms is {config.arms}; choose from {', '.join(ARMS)}, each once.")
    if "expert" in config.arms and (without := [t.name for t in tasks if not benchmark.expert_can(t.name)]):
        raise ConfigError(
            f"arms is {config.arms}; {config.benchmark} has no expert for {', '.join(without[:5])}"
            f"{' and others' if len(without) > 5 else ''}, leave it or them out."
        )
    least = {"episodes_per_task": 1, "video_every": 0, "workers": 1, "seed": 0}
    for name, value in least.items():
        if getattr(config, name) < value:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be {value} or more.")
    for name in ("execute_steps", "max_steps"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be 1 or more.")
    _check_simulator(config)
    last = config.seed + config.episodes_per_task
    if benchmark.seeds is not None and last > benchmark.seeds:
        raise ConfigError(
            f"seed {config.seed} and episodes_per_task {config.episodes_per_task} ask for initial states up to "
            f"{last - 1}; {config.benchmark} has {benchmark.seeds} per task, from 0 to {benchmark.seeds - 1}."
        )
    return replace(
        config,
        tasks=[task.name for task in tasks],
        options=options,
        cameras=list(view.cameras),
    )


def _view(config: EvaluateConfig) -> View:
    size = (config.height, config.width)
    benchmark = benchmark_class(config.benchmark)
    return selected_view(benchmark, config.cameras, size, videos=config.video_every > 0)


def _check_simulator(config: EvaluateConfig) -> None:
    simulator = config.simulator
    for name in ("step_timeout_s", "reset_timeout_s", "memory_gb"):
        if not getattr(simulator, name) > 0:
            raise ConfigError(f"simulator.{name} is {getattr(simulator, name)}; it must be more than 0.")
    if simulator.retries < 0:
        raise ConfigError(f"simulator.retries is {simulator.retries}; it must be 0 or more.")
