"""Exceptions that a user can cause; their messages name the cause, where it is, and the fix."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from pathlib import Path

from defi_platform import logs

MEND = 2
"""Exit code of a job whose user has to change something; the same command would end in the same way."""
TRY_AGAIN = 75
"""Exit code of a job that the same command may complete: EX_TEMPFAIL of sysexits.h."""
UNREAD = 141
"""Exit code of a job whose output nobody reads any more, as after `| head`: that of a program that SIGPIPE ends."""


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


class SimulatorFault(UserError):
    """A simulator that hung, died or broke in an episode; a fresh process may well run the same episode to its end.

    `kind` is hang, abort, memory, render, protocol or error; worker for a rollout worker that died itself.
    """

    exit_code = TRY_AGAIN

    def __init__(self, kind: str, message: str, place: str = ""):
        super().__init__(kind, message, place)
        self.kind = kind
        self.message = message
        self.place = place
        """Host, where it is known."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


class ServeError(UserError):
    """A policy server that cannot start or cannot be reached."""


def one_line(error: BaseException) -> str:
    """The error's message on one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def exit_code(job: Callable[[], int]) -> int:
    """Runs a job and reports an error that the user can fix as one message on stderr.

    Returns: the job's own exit code; that of a `UserError`, 2 or 75; 130 after Ctrl-C; 141, see `UNREAD`.
    """
    with logs.job_log(_job_name()):
        try:
            if (kind := os.environ.get(logs.VARIABLE)) not in (None, "", "text", "json"):
                raise ConfigError(
                    f"the environment variable {logs.VARIABLE} is '{kind}'; it is text or json."
                )
            code = job()
            sys.stdout.flush()  # else it fails at the interpreter's end, where nothing can catch it
            return code
        except BrokenPipeError:
            if not _is_unread():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in its buffer
            return UNREAD
        except UserError as error:
            logs.error(f"{type(error).__name__}: {error}")
            return error.exit_code
        except KeyboardInterrupt:
            logs.error("interrupted; run the same command again to go on from here")
            return 130


def _is_unread() -> bool:
    """True when standard output is a pipe that has lost its reader."""
    try:
        output = select.poll()
        output.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in output.poll(0))
    except (OSError, ValueError):
        return False


def _job_name() -> str:
    """Name of the job that this process was started for: `defi NAME ...`, jobs/NAME.py."""
    command = Path(sys.argv[0]).stem
    return sys.argv[1] if command in ("defi", "__main__") and len(sys.argv) > 1 else command
