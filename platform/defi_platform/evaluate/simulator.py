"""The rollout worker: owns a simulator's process and a connection to the policy, and runs episode after episode."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from defi_platform.config import EvaluateConfig
from defi_platform.errors import SimulatorFault
from defi_platform.evaluate.benchmarks.interface import Benchmark
from defi_platform.evaluate.benchmarks.registry import benchmark_class, selected_options, selected_view
from defi_platform.evaluate.episode import (
    Arm,
    Expert,
    Outcome,
    RandomPolicy,
    Rollout,
    ServedPolicy,
    run_episode,
)
from defi_platform.evaluate.policy.observation import client_keys
from defi_platform.evaluate.policy.vla_eval import connect_policy
from defi_platform.evaluate.policy_client import PolicyClient
from defi_platform.evaluate.simulation.interpreter import interpreter
from defi_platform.evaluate.simulation.process import SimulatorProcess

ONE_THREAD = ("LP_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables of software rendering and numerics: a worker asks Ray for one CPU, and so does its simulator."""

ARMS = ("policy", "random", "expert")
"""The policies that can be put to the test."""


class Simulator:
    """Runs rollouts one after the other; a Ray actor when evaluating."""

    def __init__(
        self,
        config: EvaluateConfig,
        url: str,
        greeting: Mapping[str, Any] | None = None,
        search_path: Sequence[str] = (),
    ):
        """Prepares a worker; process and connection are made when the first rollout needs them.

        Args:
            config: of the evaluation.
            url: of the policy server; only the "policy" arm calls it.
            greeting: of the policy that is evaluated; None where nothing is known of it.
            search_path: folders of modules, in which benchmarks from outside are found too.
        """
        sys.path += [folder for folder in search_path if folder not in sys.path]
        for variable in ONE_THREAD:
            os.environ.setdefault(variable, "1")
        self._config = config
        self._url = url
        self._greeting = greeting or {}
        self._process: SimulatorProcess | None = None
        self._client: PolicyClient | None = None

    @cached_property
    def _benchmark(self) -> type[Benchmark]:
        return benchmark_class(self._config.benchmark)

    def ready(self) -> None:
        """Returns once the worker's process is up.

        Raises:
            ConfigError: this machine has no such benchmark.
        """
        assert self._benchmark

    def work(self, rollout: Rollout) -> Outcome:
        """Runs one episode.

        Raises:
            SimulatorFault: the simulator did not survive it; the next one gets a fresh process.
            SimulatorError: the simulator cannot run here.
            ServeError: the policy does not answer, or another one does.
        """
        config = self._config
        try:
            process = self._simulator()
            outcome = run_episode(
                process,
                self._arm(rollout),
                rollout,
                max_steps=config.max_steps,
                frame_every=config.video_every,
                control_hz=self._benchmark.control_hz,
            )
        except SimulatorFault as fault:
            if self._process is not None:
                self._process.close()
                self._process = None
            raise SimulatorFault(fault.kind, fault.message, socket.gethostname()) from fault
        if rollout.arm == "policy":
            outcome.row["policy_digest"] = self._greeting.get("policy_digest")
        return replace(outcome, protocol=process.protocol)

    def _simulator(self) -> SimulatorProcess:
        if self._process is None:
            config = self._config
            self._process = SimulatorProcess(
                config.benchmark,
                selected_view(
                    self._benchmark,
                    config.cameras,
                    (config.height, config.width),
                    videos=config.video_every > 0,
                ),
                selected_options(self._benchmark, config.options),
                interpreter(config.benchmark, config.simulator, config.output),
                config.simulator,
            )
        return self._process

    def _arm(self, rollout: Rollout) -> Arm:
        if rollout.arm == "random":
            return RandomPolicy(rollout, self._benchmark.action)
        if rollout.arm == "expert":
            return Expert()
        if self._client is None:
            self._client = connect_policy(self._url, self._config.token_file)
        # Without a setting of its own, the evaluation does as the policy says that robots should.
        asked = self._config.execute_steps or self._client.metadata.get("action", {}).get("execute_steps")
        return ServedPolicy(
            self._client,
            rollout,
            action=self._benchmark.action,
            keys=client_keys(self._config.observation_keys),
            cameras=self._config.policy_cameras,
            execute_steps=asked,
            greeting=self._greeting,
        )
