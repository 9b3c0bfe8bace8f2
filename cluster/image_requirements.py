"""Print what an image needs beside the platform itself, one requirement a line: its dependencies and those of simulators."""

import sys
import tomllib
from pathlib import Path

# `ray up` starts and ends instances from the head with it.
EXTRA = ["boto3"]

project = tomllib.loads(Path(sys.argv[1]).read_text())["project"]
print("\n".join([*project["dependencies"], *project["optional-dependencies"]["sim"], *EXTRA]))
