"""Evaluate a served policy in closed loop, compared with a random one and the scripted expert."""

import sys

from defi_platform.config import EvaluateConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(EvaluateConfig, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.evaluate.benchmarks.registry import benchmark_class
    from defi_platform.evaluate.html.evaluation_page import write_page
    from defi_platform.evaluate.results.evaluation import read_evaluation
    from defi_platform.evaluate.rollouts import evaluate

    result = evaluate(config)
    print(result.summary())
    page = write_page(read_evaluation(result.output), benchmark_class(config.benchmark).state_names)
    print(f"page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
