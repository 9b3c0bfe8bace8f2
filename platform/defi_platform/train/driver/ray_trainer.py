"""Ray Train's controller, configured for a run: quiet, and without callbacks that this cluster does not need."""

from __future__ import annotations

import os
import tempfile
import uuid
from pathlib import Path
from typing import Any

import ray.train
from ray import cloudpickle
from ray._private.worker import get_dashboard_url
from ray.train import UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import (
    DefaultFailurePolicy,
    _is_preemption_failure,
)
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from defi_platform import roles
from defi_platform.cluster.session import is_of_this_job
from defi_platform.config import TrainConfig
from defi_platform.train.config_checks import world_sizes
from defi_platform.train.driver.elastic_scaling import FittingPolicy
from defi_platform.train.failures import FailureLog
from defi_platform.train.ray_errors import FailureLines


class RunTrainer(TorchTrainer):
    """A `TorchTrainer` for one run.

    Args:
        kind: of the recipe, for messages.
        worker: function that each worker runs.
        settings: argument of that function.
        train: settings of the run.
        resources: Ray resources of one worker.
        failures: log of the run's failures.
    """

    def __init__(
        self,
        kind: str,
        worker: Any,
        settings: dict[str, Any],
        train: TrainConfig,
        resources: dict[str, float],
        failures: FailureLog,
    ):
        settings["preemptible"] = is_preemptible()
        sizes = world_sizes(train)
        workers = train.num_workers if train.min_workers is None else (sizes[0], train.num_workers)
        super().__init__(
            worker,
            # As bytes, because Ray Train's controller unpacks the config too and would import torch for it.
            train_loop_config={"pickled": cloudpickle.dumps(settings)},
            torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
            scaling_config=ray.train.ScalingConfig(  # type: ignore[call-arg]  # Ray ships v1's types
                num_workers=workers,  # type: ignore[arg-type]
                elastic_resize_monitor_interval_s=train.resize_check_s,
                use_gpu=train.use_gpu,
                resources_per_worker=resources,
                label_selector=roles.label_selector(roles.TRAIN) or None,
            ),
            run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # Ray ships v1's types
                # Ray Train's own records, of which nothing is needed later: checkpoints go to the run folder (see
                # checkpoint/async_saver.py), and Ray would take a run of the same name for the one to continue.
                name=f"{kind}-{uuid.uuid4().hex[:8]}",
                storage_path=str(Path(tempfile.gettempdir()) / "defi-ray-train"),
                failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]  # Ray ships v1's types
                    max_failures=train.max_failures,
                    preemption_grace_s=train.preemption_grace_s,
                    # With relaxed collectives a worker on the node that will go waits for ever where it comes to a poll for
                    # notices after the others: they have left without it. They would wait for it in the next update.
                    relax_collectives_on_preemption=False,
                ),
                logging_config=ray.train.LoggingConfig(log_level="ERROR"),
                callbacks=[FailureLines(kind), ControllerEnvironment(train, settings["preemptible"])],  # type: ignore[list-item]
            ),
        )

        self._kind, self._world_sizes, self._failures = kind, sizes, failures

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if isinstance(settings["scaling_policy"], ElasticScalingPolicy):
            settings["scaling_policy"] = FittingPolicy(self._kind, self.scaling_config, self._world_sizes)
        settings["failure_policy"] = NoRepeats(self.run_config.failure_config, self._failures)
        return super()._initialize_and_run_controller(**settings)  # type: ignore[misc]

    def _create_default_callbacks(self) -> list[Any]:
        # Ray Train distributes no datasets here (each worker streams its own part of the plan), so the actor for it is
        # not started; it takes two seconds of a core.
        unneeded: tuple[type, ...] = (DatasetsCallback,)
        if not get_dashboard_url():
            # The cleaner asks the dashboard whether the controller lives. Without one it logs an error every second;
            # Ray frees the placement group of a dead job in any case.
            unneeded += (PlacementGroupCleanerCallback,)
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in callbacks if not isinstance(one, unneeded)]


class ControllerEnvironment(UserCallback):
    """Environment variables that Ray Train reads, set in the controller's process when this is unpickled there.

    Runs that one driver starts need different values. A variable that the user has set is left as it is.
    """

    def __init__(self, train: TrainConfig, preemptible: bool):
        self._values = {
            # The end of a run, or a dead worker, is noticed at a poll; two seconds are long for short runs.
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            # Ray Train would repeat printed lines in its log, which goes to the same console.
            "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
            # One process less to start where no node can be preempted.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": str(int(preemptible)),
        }
        if train.min_workers is not None:
            # After a loss Ray asks for as many workers as before until it knows that the node is gone; a minute per
            # answer is long for a run that could go on with fewer.
            self._values["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name, value in self._values.items():
            os.environ.setdefault(name, value)


class NoRepeats(DefaultFailurePolicy):
    """Ray's policy for failures, ended where the same one comes again and again.

    Args:
        config: Ray's settings.
        failures: log of the run.
    """

    def __init__(self, config: Any, failures: FailureLog):
        super().__init__(config)
        self._failures = failures

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Records the failure and decides about another attempt."""
        decision: FailureDecision = super().make_decision(training_failed_error)
        if isinstance(training_failed_error, ray.train.ControllerError):
            return decision  # of workers that could not be started: nodes come and go
        errors = getattr(training_failed_error, "worker_failures", {})
        preempted = _is_preemption_failure(training_failed_error)
        return FailureDecision.RAISE if self._failures.add(errors, preempted=preempted) else decision


def is_preemptible() -> bool:
    """Whether a node may be announced to go: in any cluster that may have other nodes than this machine, now or later."""
    return not is_of_this_job()
