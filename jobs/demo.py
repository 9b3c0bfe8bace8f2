"""Every stage of the platform once on this machine: `make demo`."""

import sys

from defi_platform.config import DemoConfig
from defi_platform.config_file import parse_arguments
from defi_platform.demo import run_demo
from defi_platform.errors import exit_code


def main() -> int:
    print(f"report: {run_demo(parse_arguments(DemoConfig))}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
