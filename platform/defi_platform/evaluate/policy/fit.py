"""Whether a policy can drive a benchmark: what its greeting says, and one answer where the greeting says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from defi_platform.config import EvaluateConfig
from defi_platform.errors import ConfigError
from defi_platform.evaluate.benchmarks.registry import (
    benchmark_class,
    selected_options,
    selected_tasks,
    selected_view,
)
from defi_platform.evaluate.policy.observation import client_keys, policy_observation
from defi_platform.evaluate.policy_client import PolicyClient, check_metadata


def check_fits(config: EvaluateConfig, greeting: Mapping[str, Any], source: str) -> None:
    """Checks that a policy can drive the benchmark by what it says of itself; see `check_metadata`.

    Args:
        config: checked.
        greeting: of its server.
        source: url or folder, for the message.
    """
    benchmark = benchmark_class(config.benchmark)
    check_metadata(
        dict(greeting),
        source=source,
        benchmark=config.benchmark,
        cameras=[config.policy_cameras.get(camera, camera) for camera in config.cameras or ()],
        state_dim=len(benchmark.state_names),
        action_dim=benchmark.action.dim,
        execute_steps=config.execute_steps,
    )


def check_answer(config: EvaluateConfig, client: PolicyClient) -> None:
    """Asks a policy whose greeting does not say what its actions are about one grey picture.

    Args:
        config: checked.
        client: connected to its server.

    Raises:
        ConfigError: its actions are not those of the benchmark, or fewer than are to be executed.
        ServeError: it gives no usable answer.
    """
    if {"action_dim", "chunk"} <= client.metadata.keys():
        return
    benchmark = benchmark_class(config.benchmark)
    size = (config.height, config.width)
    view = selected_view(benchmark, config.cameras, size, videos=config.video_every > 0)
    task = selected_tasks(benchmark, selected_options(benchmark, config.options), config.tasks)[0]
    message = policy_observation(
        client_keys(config.observation_keys),
        {
            config.policy_cameras.get(camera, camera): np.full((*view.size(camera), 3), 127, np.uint8)
            for camera in view.cameras
        },
        np.zeros(len(benchmark.state_names), np.float32),
        prompt=task.instruction,
        seed=0,
    )
    client.begin_episode(task.name)
    actions, _ = client.infer(message)
    wrong = []
    if actions.shape[1] != benchmark.action.dim:
        names = ", ".join(benchmark.action.names)
        wrong.append(
            f"it gives {actions.shape[1]} action dims, {config.benchmark} takes {benchmark.action.dim} ({names})"
        )
    if config.execute_steps is not None and config.execute_steps > len(actions):
        wrong.append(f"it gives chunks of {len(actions)} actions, execute_steps is {config.execute_steps}")
    if wrong:
        raise ConfigError(
            f"the policy at {client.url} does not fit: {'; '.join(wrong)}. Serve a policy for this benchmark, or set "
            "execute_steps to what it has."
        )
