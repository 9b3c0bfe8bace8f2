"""Check on every node that a cluster can run a job: one line per check, ok or what to do."""

import sys

import source_tree  # noqa: F401 - first, so that the packages are those of this checkout

from defi_platform.errors import exit_code
from defi_platform.jobs.check_cluster import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
