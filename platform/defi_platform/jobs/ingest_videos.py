"""Bring a manifest up to date with its corpora: list, open every new file once, sort out what is damaged."""

import sys

from defi_platform.config import IngestConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code

FLAGS = {"--strict": "data.strict=true", "--retry-quarantined": "data.retry_quarantined=true"}


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(IngestConfig, flags=FLAGS, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.data.ingest.pipeline import run_ingest

    print(run_ingest(config))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
