"""Fill a latent cache: frames as GFDM's or GIDM's frozen encoder sees them, so that training need not decode."""

import sys

from defi_platform.config import EncodeConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    """Runs the job. Returns: the exit code."""
    config = parse_arguments(EncodeConfig, description=__doc__)
    # Imported late: it takes seconds, and --help and mistakes in the config should not.
    from defi_platform.encode_latents import encode_latents

    print(encode_latents(config).text())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
