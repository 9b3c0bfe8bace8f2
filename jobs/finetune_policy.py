"""Fine-tune the fused policy on labelled episodes."""

import sys

import source_tree  # noqa: F401 - first: the packages may be those of this checkout

from defi_platform.config import FinetuneConfig
from defi_platform.config_file import parse_arguments
from defi_platform.errors import exit_code
from defi_platform.train.finetune import finetune

FLAGS = {"--dry-run": "dry_run=true"}


def main() -> int:
    print(finetune(parse_arguments(FinetuneConfig, flags=FLAGS)).text())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
