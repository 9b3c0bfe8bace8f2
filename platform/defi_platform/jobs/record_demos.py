"""Record a simulator's scripted experts as LeRobot v3.0 datasets."""

import sys

from defi_platform.config import RecordConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(RecordConfig, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.evaluate.record import record

    print(record(config).summary())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
