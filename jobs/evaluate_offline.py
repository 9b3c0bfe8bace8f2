"""Hold a policy's actions against those recorded in a LeRobot dataset; needs no simulator."""

import sys

import source_tree  # noqa: F401 - first, so that the packages are those of this checkout

from defi_platform.errors import exit_code
from defi_platform.jobs.evaluate_offline import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
