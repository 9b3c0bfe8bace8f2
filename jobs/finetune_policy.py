"""Fine-tune the fused policy on labelled episodes."""

import sys

import source_tree  # noqa: F401 - first: the packages may be those of this checkout

from defi_platform.config import FinetuneConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code

FLAGS = {"--dry-run": "dry_run=true"}


def main() -> int:
    config = parse_arguments(FinetuneConfig, flags=FLAGS)
    # Only now: it imports for seconds, and a mistake in the config is told before.
    from defi_platform.train.driver.finetune import finetune

    print(finetune(config).text())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
