"""Run a job on a Ray cluster until it is complete: submit it, follow it, and submit it again when it or the head dies."""

import sys

from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    from defi_platform.supervise.command import supervise

    return supervise(description=__doc__)


if __name__ == "__main__":
    sys.exit(exit_code(main))
