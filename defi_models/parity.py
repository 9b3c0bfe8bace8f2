"""Entry point of `python -m defi_models.parity FOLDER`: our outputs compared with tensors recorded from the reference."""

import sys

from defi_models.conversion.parity import main

if __name__ == "__main__":
    sys.exit(main())
