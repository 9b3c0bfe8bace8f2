"""Every stage of the platform once on this machine: `make demo`."""

import sys

from defi_platform.config import DemoConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(DemoConfig, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.demo import run_demo

    print(f"report: {run_demo(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
