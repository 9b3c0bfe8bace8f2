"""Record a simulator's scripted experts as LeRobot v3.0 datasets."""

import sys

from defi_platform.config import RecordConfig
from defi_platform.config_file import parse_arguments
from defi_platform.errors import exit_code
from defi_platform.evaluate.recording import record


def main() -> int:
    print(record(parse_arguments(RecordConfig)).summary())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
