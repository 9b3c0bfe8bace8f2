"""Makes the dataset of a recording whose process was killed: python -m defi_client.recording FOLDER."""

from __future__ import annotations

import sys

from defi_client.errors import RecordError
from defi_client.recording.recorder import assemble


def main(arguments: list[str]) -> int:
    """Runs the command. Returns: its exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(assemble(arguments[0]))
    except RecordError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
