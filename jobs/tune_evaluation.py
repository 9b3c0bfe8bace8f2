"""Measure simulators and policy, and say which workers, replicas and hours an evaluation needs."""

import sys

import source_tree  # noqa: F401 - first, so that the packages are those of this checkout

from defi_platform.errors import exit_code
from defi_platform.jobs.tune_evaluation import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
