"""Hold a policy's actions against those recorded in a LeRobot dataset; needs no simulator."""

import sys

from defi_platform.config import OfflineConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(OfflineConfig, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.evaluate.offline.evaluate import evaluate_offline

    print(evaluate_offline(config).summary())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
