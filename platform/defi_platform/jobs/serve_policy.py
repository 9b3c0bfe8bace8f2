"""Serve a policy over websockets until Ctrl-C."""

import sys

from defi_platform.config import ServeConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(ServeConfig, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.serve.deployment.command import serve_policy

    return serve_policy(config)


if __name__ == "__main__":
    sys.exit(exit_code(main))
