"""The config of an evaluation, checked and with every default named; its units in order and its deciding settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from defi_platform.config import EvaluateConfig, RecordConfig, SimulatorConfig, StopRuleConfig
from defi_platform.config.loader import to_mapping
from defi_platform.errors import ConfigError
from defi_platform.evaluate.benchmarks.interface import View
from defi_platform.evaluate.benchmarks.registry import (
    benchmark_class,
    selected_options,
    selected_tasks,
    selected_view,
)
from defi_platform.evaluate.episode import Rollout
from defi_platform.evaluate.fleet.stop_rule import StopRule
from defi_platform.evaluate.policy.observation import client_keys
from defi_platform.evaluate.simulator import ARMS

_DECIDING = ("benchmark", "options", "policy_cameras", "execute_steps", "max_steps", "observation_keys")
_UNBOUNDED_SEED = 10_000
"""First seed by default, where any number is one."""


def first_seed(config: EvaluateConfig) -> int:
    """Seed of the first initial state of each task: as configured, else apart from those of recordings where it can be.

    Raises:
        ConfigError: there is no such benchmark, option or task.
    """
    if config.seed is not None:
        return config.seed
    return _UNBOUNDED_SEED if all(most is None for most in _initial_states(config).values()) else 0


def seeds(config: EvaluateConfig, task: str) -> range:
    """Seeds of a task's episodes.

    Args:
        config: checked.
        task: one of its tasks.
    """
    first, episodes = first_seed(config), config.episodes_per_task
    if episodes is None:
        most = _initial_states(replace(config, tasks=[task]))[task]
        assert most is not None, "a checked config says how many"
        return range(first, most)
    return range(first, first + episodes)


def _initial_states(config: EvaluateConfig) -> dict[str, int | None]:
    """Number of official initial states by task; None where any seed is one."""
    benchmark = benchmark_class(config.benchmark)
    options = selected_options(benchmark, config.options)
    names = [task.name for task in selected_tasks(benchmark, options, config.tasks)]
    return {name: benchmark.initial_states(name, options) for name in names}


def check_initial_states(
    config: EvaluateConfig | RecordConfig, seed: int, known: Mapping[str, int | None]
) -> None:
    """Checks that there are the initial states that a config asks for.

    Args:
        config: an evaluation or a recording.
        seed: of the first.
        known: number of initial states by task.

    Raises:
        ConfigError: a task has fewer; or all are asked for where there is no end of them.
    """
    episodes = config.episodes_per_task
    if episodes is None:
        if endless := [task for task, most in known.items() if most is None]:
            raise ConfigError(
                f"episodes_per_task is null, for all initial states; {endless[0]} of {config.benchmark} has no fixed number of "
                "them: say how many."
            )
        episodes = 1
    lacking = {task: most for task, most in known.items() if most is not None and seed + episodes > most}
    if not lacking:
        return
    task, most = min(lacking.items(), key=lambda one: one[1])
    few = f", as has {task}" if len(set(known.values())) > 1 else ""
    raise ConfigError(
        f"seed {seed} and episodes_per_task {config.episodes_per_task} ask for initial states up to {seed + episodes - 1}; "
        f"{config.benchmark} has {most} per task{few}, from 0 to {most - 1}."
        + (" episodes_per_task=null asks for all that each task has." if few else "")
    )


def settings(config: EvaluateConfig) -> dict[str, Any]:
    """The settings that decide an episode's outcome besides its unit and the policy, as JSON values.

    Args:
        config: checked.
    """
    mapping = to_mapping(config)
    view = _view(config)
    return {
        **{name: mapping[name] for name in _DECIDING},
        "view": {camera: list(view.size(camera)) for camera in view.cameras},
    }


def asked(config: EvaluateConfig) -> dict[str, Any]:
    """Extent of a summary: the units and the rule that may end them early, as JSON values."""
    rule = stop_rule(config.stop_rule)
    return {
        "tasks": list(config.tasks),
        "arms": list(config.arms),
        "seed": first_seed(config),
        "episodes_per_task": config.episodes_per_task,
        "stop_rule": None if rule is None else vars(rule),
    }


def blocks(config: EvaluateConfig) -> list[list[Rollout]]:
    """Every unit of a checked config in its fixed order, those of one initial state next to each other.

    Task by task, since a worker changes tasks at a cost; with a rule seed by seed, a block being one seed of every task.
    """
    by_task = {task: seeds(config, task) for task in config.tasks}
    if config.stop_rule.p0 is None:
        return [
            [Rollout(arm, task, seed) for seed in by_task[task] for arm in config.arms] for task in by_task
        ]
    every = range(first_seed(config), max(some.stop for some in by_task.values()))
    return [
        [Rollout(arm, task, seed) for task, some in by_task.items() if seed in some for arm in config.arms]
        for seed in every
    ]


def stop_rule(config: StopRuleConfig) -> StopRule | None:
    """The sequential test that a config asks for; None without one.

    Raises:
        ConfigError: its rates or errors cannot be.
    """
    if config.p0 is None and config.p1 is None:
        unset = StopRuleConfig()
        for name in ("alpha", "beta"):
            if getattr(config, name) != getattr(unset, name):
                raise ConfigError(
                    f"stop_rule.{name} is {getattr(config, name)}, and there is no test that it is an error of; set "
                    "stop_rule.p0 and stop_rule.p1 too, or leave it out."
                )
        return None
    if config.p0 is None or config.p1 is None or not 0 < config.p0 < config.p1 < 1:
        raise ConfigError(
            f"stop_rule.p0 is {config.p0} and stop_rule.p1 is {config.p1}; set both, with 0 < p0 < p1 < 1."
        )
    for name in ("alpha", "beta"):
        if not 0 < getattr(config, name) < 0.5:
            raise ConfigError(f"stop_rule.{name} is {getattr(config, name)}; it must be between 0 and 0.5.")
    return StopRule(config.p0, config.p1, config.alpha, config.beta)


def checked(config: EvaluateConfig) -> EvaluateConfig:
    """The config with every task, option and camera named.

    Raises:
        ConfigError: a setting cannot be.
    """
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
    seed = first_seed(config)
    config = replace(config, seed=seed)
    least = {"episodes_per_task": 1, "video_every": 0, "workers": 1, "seed": 0}
    for name, value in least.items():
        given = getattr(config, name)
        if given is not None and given < value:
            raise ConfigError(f"{name} is {given}; it must be {value} or more.")
    for name in ("execute_steps", "max_steps"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be 1 or more.")
    if config.stop_rule.p0 is not None and "policy" not in config.arms:
        raise ConfigError(f"stop_rule is a test of the policy, and arms is {config.arms}; add policy.")
    for camera in config.policy_cameras:
        if camera not in view.cameras:
            raise ConfigError(
                f"policy_cameras names '{camera}'; the evaluation looks through {', '.join(view.cameras)} (cameras)."
            )
    client_keys(config.observation_keys)
    check_limits(config.simulator)
    stop_rule(config.stop_rule)
    check_initial_states(config, seed, _initial_states(config))
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


def check_limits(simulator: SimulatorConfig) -> None:
    """Checks the limits of a simulator's process.

    Raises:
        ConfigError: one of them cannot be.
    """
    for name in ("step_timeout_s", "reset_timeout_s", "memory_gb"):
        if not 0 < getattr(simulator, name) < math.inf:
            raise ConfigError(
                f"simulator.{name} is {getattr(simulator, name)}; it must be more than 0, and not without end."
            )
    if simulator.retries < 0:
        raise ConfigError(f"simulator.retries is {simulator.retries}; it must be 0 or more.")
