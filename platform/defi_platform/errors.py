"""Exceptions that a user can cause; their messages name the cause, where it is, and the fix."""

from __future__ import annotations

import sys
from collections.abc import Callable

MEND = 2
"""Exit code of a job whose user has to change something; the same command would end in the same way."""
TRY_AGAIN = 75
"""Exit code of a job that the same command may complete: EX_TEMPFAIL of sysexits.h."""


class UserError(Exception):
    """An error for the user, as a message that names the fix. Jobs print it without a traceback."""

    exit_code = MEND
    """Of the job that it ends; `TRY_AGAIN` where nothing but another try may be needed."""


class ConfigError(UserError):
    """A configuration file or override that does not fit its schema."""


class CorpusError(UserError):
    """A corpus, manifest or plan that is absent, empty or not what the configuration says."""


class CheckpointError(UserError):
    """A checkpoint or model folder that is absent, partial, damaged or of another model."""


class SimulatorError(UserError):
    """A simulator or its rendering that cannot run on this machine."""


class ServeError(UserError):
    """A policy server that cannot start or cannot be reached."""


def one_line(error: BaseException) -> str:
    """The error's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def exit_code(job: Callable[[], int]) -> int:
    """Runs a job and reports an error that the user can fix as one message on stderr.

    Returns: the job's own exit code; that of a `UserError`, 2 or 75; 130 after Ctrl-C.
    """
    try:
        return job()
    except UserError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from here", file=sys.stderr)
        return 130
