"""Entry point of `python -m defi_models.convert`: the authors' checkpoints to ours and back."""

import sys

from defi_models.conversion.cli import main

if __name__ == "__main__":
    sys.exit(main())
