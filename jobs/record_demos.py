"""Record a simulator's scripted experts as LeRobot v3.0 datasets."""

import sys

from defi_platform.config import RecordConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    config = parse_arguments(RecordConfig)
    # Only now: it imports for seconds, and a mistake in the config is told before.
    from defi_platform.evaluate.record import record

    print(record(config).summary())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
