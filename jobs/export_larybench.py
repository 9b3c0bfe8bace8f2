"""Export GIDM's latent actions of labelled corpora, or of LARYBench's own tables, in LARYBench's layout."""

import sys

import source_tree  # noqa: F401 - first, so that the packages are those of this checkout

from defi_platform.errors import exit_code
from defi_platform.jobs.export_larybench import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
