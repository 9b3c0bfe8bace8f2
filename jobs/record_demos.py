"""Record a simulator's scripted experts as LeRobot v3.0 datasets."""

import sys

import source_tree  # noqa: F401 - first, so that the packages are those of this checkout

from defi_platform.errors import exit_code
from defi_platform.jobs.record_demos import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
