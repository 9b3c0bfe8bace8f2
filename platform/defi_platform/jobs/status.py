"""Show all runs of a folder tree or a cluster: progress, rate, last checkpoint, failures and cost."""

import sys

from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    # Imported late: mistakes of the platform's set-up are one line then, too.
    from defi_platform.status.command import show_status

    return show_status()


if __name__ == "__main__":
    sys.exit(exit_code(main))
