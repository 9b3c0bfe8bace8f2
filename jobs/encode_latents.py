"""Fill a latent cache: frames as GFDM's or GIDM's frozen encoder sees them, so that training need not decode."""

import sys

import source_tree  # noqa: F401 - first: the packages may be those of this checkout

from defi_platform.config import EncodeConfig
from defi_platform.config.loader import parse_arguments
from defi_platform.errors import exit_code


def main() -> int:
    config = parse_arguments(EncodeConfig)
    # Only now: it imports for seconds, and a mistake in the config is told before.
    from defi_platform.encode_latents import encode_latents

    print(encode_latents(config).text())
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
