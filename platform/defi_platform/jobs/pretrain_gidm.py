"""Pretrain GIDM, the inverse dynamics model, on action-free video."""

import sys

from defi_platform.config import PretrainConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code

FLAGS = {"--dry-run": "dry_run=true"}


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(PretrainConfig, flags=FLAGS, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.train.driver.pretrain import pretrain

    print(pretrain("gidm", config).text())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
