"""Recording of episodes as LeRobot v3.0 datasets."""

import importlib.util

_MISSING = [name for name in ("av", "pyarrow") if importlib.util.find_spec(name) is None]
if _MISSING:
    raise ImportError(f"recording needs {' and '.join(_MISSING)}: pip install 'defi-client[record]'")
