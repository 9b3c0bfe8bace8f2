"""Serve a policy over websockets until Ctrl-C."""

import sys

import source_tree  # noqa: F401 - first: the packages may be those of this checkout

from defi_platform.config import ServeConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    config = parse_arguments(ServeConfig)
    # Only now: it imports for seconds, and a mistake in the config is told before.
    from defi_platform.serve.app import serve_policy

    return serve_policy(config)


if __name__ == "__main__":
    sys.exit(exit_code(main))
