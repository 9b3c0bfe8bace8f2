"""Installation of a benchmark by its name: what the job does."""

from __future__ import annotations

import sys

from defi_platform.config import InstallConfig
from defi_platform.config.paths import absolute_paths
from defi_platform.errors import ConfigError, SimulatorError
from defi_platform.evaluate.benchmarks.registry import benchmark_class, registration
from defi_platform.evaluate.installation.environment import Environment
from defi_platform.evaluate.installation.package_list import package_list
from defi_platform.evaluate.simulation.interpreter import installation, missing_modules


def install(config: InstallConfig) -> str:
    """Makes a benchmark's environment; for one that fits into ours it says the command that installs it.

    Returns:
        A message for the user.

    Raises:
        ConfigError: there is no such benchmark, or an option does not suit it.
        SimulatorError: it is an extra that is not installed, or its installation failed.
    """
    config = absolute_paths(config)
    found = registration(config.benchmark)
    benchmark_class(config.benchmark)  # of one from outside it says whether it is there
    if found.environment is None:
        for key in ("python", "clones"):
            if getattr(config, key):
                raise ConfigError(f"{key}: {config.benchmark} needs no interpreter of its own; leave it out.")
        missing = missing_modules(config.benchmark)
        if missing:
            raise SimulatorError(
                f"{config.benchmark} is not installed in {sys.executable} (no module '{missing[0]}'), and runs in no "
                f"other interpreter. {installation(config.benchmark)}"
            )
        return f"{config.benchmark} is installed in {sys.executable}"
    environment = Environment(config.environments, found.environment)
    made = environment.make(package_list(found.environment), config.python, config.clones, found.needs)
    state = "is installed" if made else "was installed before"
    return f"{config.benchmark} {state} in {environment.path}; evaluate with simulator.environments={config.environments}"
