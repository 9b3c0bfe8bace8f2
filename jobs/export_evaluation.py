"""Export an evaluation: vla-eval's results file, an entry of its leaderboard, or recordings for Rerun's viewer."""

import sys

import source_tree  # noqa: F401 - first, so that the packages are those of this checkout

from defi_platform.errors import exit_code
from defi_platform.jobs.export_evaluation import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
