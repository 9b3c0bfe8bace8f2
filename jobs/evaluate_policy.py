"""Evaluate a served policy in closed loop, compared with a random one and the scripted expert."""

import sys

import source_tree  # noqa: F401 - first, so that the packages are those of this checkout

from defi_platform.errors import exit_code
from defi_platform.jobs.evaluate_policy import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
