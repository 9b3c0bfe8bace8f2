"""Write one HTML page about the corpora: contact sheets, statistics, the mixture, what is in quarantine."""

import sys

from defi_platform.config import InspectConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(InspectConfig, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.evaluate.html.corpus_page import inspect_corpora

    print(f"corpora: {inspect_corpora(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
