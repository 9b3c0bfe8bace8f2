"""Every stage of the platform once on this machine: `make demo`."""

import sys

from defi_platform.config import DemoConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    config = parse_arguments(DemoConfig)
    # Only now: it imports for seconds, and a mistake in the config is told before.
    from defi_platform.demo import run_demo

    print(f"report: {run_demo(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
