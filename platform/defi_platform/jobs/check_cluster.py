"""Check on every node that a cluster can run a job: one line per check, ok or what to do."""

import sys

from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    # Imported late: mistakes of the platform's set-up are one line then, too.
    from defi_platform.preflight.command import check_cluster

    return check_cluster()


if __name__ == "__main__":
    sys.exit(exit_code(main))
