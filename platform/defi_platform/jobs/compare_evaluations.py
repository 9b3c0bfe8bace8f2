"""Compare evaluations on the initial states that all policies met: rates, differences, tests."""

import json
import sys

from defi_platform.config import CompareConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code

WORSE = 1
"""Exit code with --fail-if-worse when a policy is significantly worse than the first."""


def main() -> int:
    """Runs the job. Returns: 0; 1, see `WORSE`."""
    config = parse_arguments(
        CompareConfig,
        flags={"--json": "json=true", "--fail-if-worse": "fail_if_worse=true"},
        description=__doc__,
        positional="outputs",
    )
    # Imported late: --help and mistakes in the config should not wait for SciPy.
    from defi_platform.evaluate.results.comparison import compare

    result = compare(config)
    print(json.dumps(result.as_mapping(), indent=1) if config.json else result.summary())
    return WORSE if config.fail_if_worse and result.significantly_worse else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
