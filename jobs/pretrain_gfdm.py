"""Pretrain GFDM, the forward dynamics model, on action-free video."""

import sys

import source_tree  # noqa: F401 - first: the packages may be those of this checkout

from defi_platform.config import PretrainConfig
from defi_platform.config_file import parse_arguments
from defi_platform.errors import exit_code
from defi_platform.train.pretrain import pretrain

FLAGS = {"--dry-run": "dry_run=true"}


def main() -> int:
    print(pretrain("gfdm", parse_arguments(PretrainConfig, flags=FLAGS)).text())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
