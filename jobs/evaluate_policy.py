"""Evaluate a served policy in closed loop, beside a random one and the scripted expert."""

import sys

from defi_platform.config import EvaluateConfig
from defi_platform.config_file import parse_arguments
from defi_platform.errors import exit_code
from defi_platform.evaluate.rollouts import evaluate


def main() -> int:
    print(evaluate(parse_arguments(EvaluateConfig)).summary())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
