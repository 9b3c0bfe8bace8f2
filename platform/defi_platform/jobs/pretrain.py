"""Pretrain GFDM and GIDM side by side on one cluster."""

import sys

from defi_platform.config import PretrainBothConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code

FLAGS = {"--dry-run": "dry_run=true"}


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(PretrainBothConfig, flags=FLAGS, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.train.driver.pretrain import pretrain_both

    for summary in pretrain_both(config).values():
        print(summary.text())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
