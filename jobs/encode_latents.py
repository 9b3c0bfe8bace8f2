"""Fill a latent cache: frames as GFDM's or GIDM's frozen encoder sees them, so that training need not decode."""

import sys

import source_tree  # noqa: F401 - first, so that the packages are those of this checkout

from defi_platform.errors import exit_code
from defi_platform.jobs.encode_latents import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
