"""Evaluate a served policy in closed loop, compared with a random one and the scripted expert."""

import sys

from defi_platform.config import EvaluateConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(EvaluateConfig, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.evaluate.rollouts import evaluate

    print(evaluate(config).summary())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
