"""EGL, by which MuJoCo's simulators render without a display; its absence is one error with the fix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from defi_platform.errors import SimulatorError, one_line

FIX = "install it with: apt-get install -y libegl1 libegl-mesa0"


def choose_egl() -> None:
    """Chooses EGL where nothing else is chosen; call it before a simulator is imported."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    # Simulators fill the cores by running side by side; more threads per image only get in their way.
    os.environ.setdefault("LP_NUM_THREADS", "0")


@contextmanager
def loading_egl() -> Iterator[None]:
    """Chooses EGL for the imports of a `with`, which load its library.

    Raises:
        SimulatorError: the library cannot be loaded; a module that is not installed stays what it is.
    """
    choose_egl()
    try:
        yield
    except ModuleNotFoundError:
        raise
    except (ImportError, AttributeError, RuntimeError, OSError) as error:
        raise SimulatorError(f"EGL cannot be loaded on this machine ({one_line(error)}); {FIX}") from error
