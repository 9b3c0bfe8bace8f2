"""Compare evaluations on the initial states that all policies met: rates, differences, tests."""

import sys

import source_tree  # noqa: F401 - first, so that the packages are those of this checkout

from defi_platform.errors import exit_code
from defi_platform.jobs.compare_evaluations import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
