"""Write one HTML page about the corpora: contact sheets, statistics, the mixture, what is in quarantine."""

import sys

import source_tree  # noqa: F401 - first: the packages may be those of this checkout

from defi_platform.config import InspectConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    config = parse_arguments(InspectConfig)
    # Only now: it imports for seconds, and a mistake in the config is told before.
    from defi_platform.evaluate.html.corpus_page import inspect_corpora

    print(f"corpora: {inspect_corpora(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
