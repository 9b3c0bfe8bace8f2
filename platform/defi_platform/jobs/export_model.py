"""Export the newest checkpoint of a training run as a model folder; the run need not be complete."""

import sys

from defi_platform.config import ExportConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(ExportConfig, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.train.driver.export_run import export_run

    print(f"model: {export_run(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
