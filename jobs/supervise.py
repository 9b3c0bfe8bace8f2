"""Run a job on a Ray cluster until it is complete: submit it, follow it, and submit it again when it or the head dies."""

import sys

import source_tree  # noqa: F401 - first, so that the packages are those of this checkout

from defi_platform.errors import exit_code
from defi_platform.jobs.supervise import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
