"""Lines of a job's log: text for people, or with DEFI_LOG=json one JSON object per line, with what the line is about.

The names of the fields are those of Ray's own JSON logs; `job`, `run`, `corpus` and `sample` are ours.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import Any, TextIO

VARIABLE = "DEFI_LOG"
"""Environment variable of a job and its processes: text (the default) or json."""
JOB = "DEFI_LOG_JOB"
"""Environment variable with the name of the job, in the job's processes on other nodes."""

_about: list[dict[str, Any]] = []
"""Fields of all lines of this process, the inner ones last."""

_FROM_WORKER = re.compile(
    r"(?:\x1b\[\d+m)?"
    r"\((?P<worker>[a-z_]+(?: \+[\dhms]+)?|.+?(?= pid=))(?: pid=(?P<process>\d+))?(?:, ip=(?P<ip>[^)]+))?\)"
    r"(?:\x1b\[0m)? (?P<text>.*)"
)
"""A line of another process, as Ray puts it into the driver's log: `(Worker pid=12, ip=10.0.0.3) text`,
`(autoscaler +3s) text`."""


def is_json() -> bool:
    """True when this process writes JSON."""
    return os.environ.get(VARIABLE) == "json"


def say(message: str, **fields: Any) -> None:
    """Writes a line of the log to stdout.

    Args:
        message: for people; may have several lines.
        fields: what it is about: run, corpus, sample, ... Only JSON shows them.
    """
    print(_json("INFO", message, fields) if is_json() else message, flush=True)


def detail(message: str, **fields: Any) -> None:
    """Writes a line to stdout where it is JSON; text for people leaves it out.

    Args:
        message: for people.
        fields: what it is about.
    """
    if is_json():
        say(message, **fields)


def error(message: str, **fields: Any) -> None:
    """Writes a line to stderr, of level ERROR where it is JSON.

    Args:
        message: for people; may have several lines.
        fields: what it is about.
    """
    print(_json("ERROR", message, fields) if is_json() else message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Adds fields to all lines of this process meanwhile, those of other threads included."""
    _about.append(fields)
    try:
        yield
    finally:
        _about.remove(fields)


@contextlib.contextmanager
def job_log(job: str) -> Iterator[None]:
    """Makes all that a job prints, its own and its workers' lines, JSON lines, if DEFI_LOG asks for that.

    Args:
        job: name of the job.
    """
    if is_json():
        os.environ[JOB] = job
        # Before Ray is imported: what it adds to repeated lines of workers would end them as JSON.
        os.environ["RAY_DEDUP_LOGS"] = "0"
    with process_log():
        yield


@contextlib.contextmanager
def process_log() -> Iterator[None]:
    """Makes all that this process prints JSON lines, if DEFI_LOG asks for that; `job_log` for processes of a job."""
    if not is_json():
        yield
        return
    before = sys.stdout, sys.stderr, sys.excepthook
    sys.stdout, sys.stderr = JsonLines(before[0], "INFO"), JsonLines(before[1], "WARNING")
    sys.excepthook = _log_exception
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, JsonLines):
                stream.end_lines()
            stream.flush()
        # An exception that leaves the job is still to be reported as JSON, by the hook.
        if sys.exc_info()[0] is None:
            sys.stdout, sys.stderr, sys.excepthook = before


def variables() -> dict[str, str]:
    """Environment variables by which the processes of this job on other nodes write the same way; {} for text."""
    return {name: os.environ[name] for name in (VARIABLE, JOB) if name in os.environ} if is_json() else {}


class JsonLines(io.TextIOBase):
    """A text stream that makes every line a JSON object; those that are one already stay as they are.

    Args:
        stream: that the objects go to.
        level: of lines that come without one.
    """

    def __init__(self, stream: TextIO, level: str) -> None:
        self._stream, self._level = stream, level
        self._begun: dict[int, str] = {}
        """Thread -> the line that it has not ended yet."""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of the stream."""
        return self._stream.encoding

    def fileno(self) -> int:
        """File descriptor of the stream, for processes that inherit it."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """True."""
        return True

    def write(self, text: str) -> int:
        """Takes text in pieces of any length. Returns: its length."""
        thread = threading.get_ident()
        # A progress bar ends what it draws with a carriage return.
        lines = (self._begun.pop(thread, "") + text).replace("\r", "\n").split("\n")
        if lines[-1]:
            self._begun[thread] = lines[-1]
        self._write_lines(lines[:-1])
        return len(text)

    def end_lines(self) -> None:
        """Writes the lines that have not ended, at the end of a process or job."""
        for thread in list(self._begun):
            self._write_lines([self._begun.pop(thread, "")])

    def flush(self) -> None:
        """Flushes whole lines; one that has not ended waits for its end."""
        self._stream.flush()

    def _write_lines(self, lines: list[str]) -> None:
        whole = "".join(f"{self._object(line)}\n" for line in lines if line.strip())
        if whole:
            # In one piece, so that threads do not write into each other's lines.
            self._stream.write(whole)

    def _object(self, line: str) -> str:
        if _is_object(line):
            return line
        found = _FROM_WORKER.fullmatch(line)
        if found is None:
            return _json(self._level, line, {})
        text, origin = found["text"], {"worker": found["worker"], "ip": found["ip"]}
        origin = {name: value for name, value in origin.items() if value}
        if _is_object(text):
            return json.dumps(json.loads(text) | origin)
        return _json(
            self._level, text, origin | ({"process": int(found["process"])} if found["process"] else {})
        )


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _json(level: str, message: str, fields: dict[str, Any]) -> str:
    now = time.time_ns()
    moment = datetime.datetime.fromtimestamp(now / 1e9, tz=datetime.UTC)
    line: dict[str, Any] = {
        "asctime": moment.strftime("%Y-%m-%d %H:%M:%S,%f")[:-3],
        "levelname": level,
        "message": message,
        "process": os.getpid(),
        "timestamp_ns": now,
    }
    if job := os.environ.get(JOB):
        line["job"] = job
    for more in (*_about, fields):
        line |= {name: value for name, value in more.items() if value is not None}
    # Paths and numbers of NumPy as text, rather than no line at all.
    return json.dumps(line, default=str)


def _log_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    text = "".join(traceback.format_exception(kind, error, trace))
    print(_json("ERROR", f"{kind.__name__}: {error}", {"exc_text": text}), file=sys.stderr, flush=True)
