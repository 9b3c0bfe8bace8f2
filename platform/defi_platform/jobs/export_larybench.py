"""Export GIDM's latent actions of labelled corpora, or of LARYBench's own tables, in LARYBench's layout."""

import sys

from defi_platform.config import LaryBenchConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(LaryBenchConfig, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.larybench.export import export_larybench

    print(export_larybench(config).text())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
