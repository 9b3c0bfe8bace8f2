"""Export the newest checkpoint of a training run as a model folder; the run need not be complete."""

import sys

import source_tree  # noqa: F401 - first, so that the packages are those of this checkout

from defi_platform.errors import exit_code
from defi_platform.jobs.export_model import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
