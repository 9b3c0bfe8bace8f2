"""Lets a job run from a checkout that is not installed, such as the copy that `ray job submit` makes.

Importing it puts this checkout's two source roots first on the path, here and, through PYTHONPATH, in every
process that is started from here. `defi_platform.cluster` passes the same roots on to a cluster's workers.
"""

import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
ROOTS = [str(REPOSITORY / "platform"), str(REPOSITORY)]

sys.path[:0] = [root for root in ROOTS if root not in sys.path]
os.environ["PYTHONPATH"] = os.pathsep.join([*ROOTS, *filter(None, [os.environ.get("PYTHONPATH")])])
