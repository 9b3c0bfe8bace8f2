"""Evaluate a served policy in closed loop, beside a random one and the scripted expert."""

import sys

from defi_platform.config import EvaluateConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    config = parse_arguments(EvaluateConfig)
    # Only now: it imports for seconds, and a mistake in the config is told before.
    from defi_platform.evaluate.rollouts import evaluate

    print(evaluate(config).summary())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
