"""Export the newest checkpoint of a training run as a model folder; the run may still be going on."""

import sys

import source_tree  # noqa: F401 - first: the packages may be those of this checkout

from defi_platform.config import ExportConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    config = parse_arguments(ExportConfig)
    # Only now: it imports for seconds, and a mistake in the config is told before.
    from defi_platform.train.driver.export_run import export_run

    print(f"model: {export_run(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
