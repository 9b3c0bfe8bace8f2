"""Measure simulators and policy, and say which workers, replicas and hours an evaluation needs."""

import sys

from defi_platform.config import TuneConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(TuneConfig, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.evaluate.tuning.run import tune

    print(tune(config).summary())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
