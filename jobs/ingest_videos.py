"""Bring a manifest up to date with its corpora: list, open every new file once, sort out what is damaged."""

import sys

import source_tree  # noqa: F401 - first, so that the packages are those of this checkout

from defi_platform.errors import exit_code
from defi_platform.jobs.ingest_videos import main

if __name__ == "__main__":
    sys.exit(exit_code(main))
