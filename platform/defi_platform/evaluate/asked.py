"""The config of an evaluation, checked and with every default named; its units in order and its deciding settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from defi_platform.config import EvaluateConfig, StopRuleConfig
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
        ConfigError: there is no such benchmark.
    """
    if config.seed is not None:
        return config.seed
    return _UNBOUNDED_SEED if benchmark_class(config.benchmark).seeds is None else 0


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
    seed = first_seed(config)
    seeds = range(seed, seed + config.episodes_per_task)
    if config.stop_rule.p0 is None:
        return [[Rollout(arm, task, seed) for seed in seeds for arm in config.arms] for task in config.tasks]
    return [[Rollout(arm, task, seed) for task in config.tasks for arm in config.arms] for seed in seeds]


def stop_rule(config: StopRuleConfig) -> StopRule | None:
    """The sequential test that a config asks for; None without one.

    Raises:
        ConfigError: its rates or errors cannot be.
    """
    if config.p0 is None and config.p1 is None:
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
        if getattr(config, name) < value:
            raise ConfigError(f"{name} is {getattr(config, name)}; it must be {value} or more.")
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
    _check_simulator(config)
    stop_rule(config.stop_rule)
    last = seed + config.episodes_per_task
    if benchmark.seeds is not None and last > benchmark.seeds:
        raise ConfigError(
            f"seed {seed} and episodes_per_task {config.episodes_per_task} ask for initial states up to "
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
