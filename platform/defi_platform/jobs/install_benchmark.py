"""Install a benchmark's simulator where the evaluation looks for it."""

import sys

from defi_platform.config import InstallConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    arguments = sys.argv[1:]
    if arguments and "=" not in arguments[0] and not arguments[0].startswith("-"):
        arguments[0] = f"benchmark={arguments[0]}"
    config = parse_arguments(InstallConfig, arguments, description=__doc__)
    # Imported late: --help and mistakes in the config should not take seconds.
    from defi_platform.evaluate.simulation.install import install

    print(install(config))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
