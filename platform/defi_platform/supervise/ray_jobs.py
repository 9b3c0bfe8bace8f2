"""Ray's job API as a supervisor needs it: typed errors, limits of time, and logs that can be taken up again."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import aiohttp
import requests
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from defi_platform.errors import UserError, one_line
from defi_platform.supervise.attempts import Ended, Outcome, Submission

CONNECT_S, ANSWER_S = 5.0, 60.0
"""Longest waits for the head: to connect, and for its answer to a request."""
METADATA = "defi_run"
"""Key of a job's metadata that names the run it is an attempt of."""
ENVIRONMENT = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
CHATTY = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk")
"""Loggers that set their own level."""
LOCAL_DASHBOARD = "http://127.0.0.1:8265"


class SubmissionError(UserError):
    """A job that the cluster does not accept."""


class HeadUnreachable(Exception):
    """A head that does not answer, or whose parts are not all up; one may answer later."""


class _RequestFailed(Exception):
    def __init__(self, status: int, text: str):
        super().__init__(f"status {status}: {one_line(Exception(text))[-300:]}")
        self.status, self.text = status, text


class _Client(JobSubmissionClient):
    """Ray's own client waits without end for a head that has stopped, and raises everything as RuntimeError."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        response: requests.Response = super()._do_request(
            method, endpoint, timeout=(CONNECT_S, ANSWER_S), **options
        )
        return response

    def _raise_error(self, r: requests.Response) -> NoReturn:
        raise _RequestFailed(r.status_code, r.text)


@dataclass(frozen=True)
class Job:
    """An attempt as the cluster knows it."""

    submission_id: str
    ended: Ended | None
    """None while it is pending or runs."""
    is_running: bool = False
    start_s: float = 0.0
    """Unix time."""


class RayJobs:
    """The jobs of a cluster.

    Args:
        address: http://host:port of the dashboard, or another address of the cluster; None: of RAY_API_SERVER_ADDRESS
            or RAY_ADDRESS, else this machine.
        print_line: prints a line of a job's log.
    """

    def __init__(self, address: str | None, print_line: Callable[[str], None]):
        found = [os.environ[name] for name in ENVIRONMENT if os.environ.get(name)]
        self.address = address or next(iter(found), LOCAL_DASHBOARD)
        # Ray's client would prefer them to the address that it is given.
        for name in ENVIRONMENT:
            os.environ.pop(name, None)
        # It names each file that it packs or leaves out, and each connection that it closes.
        for name in ("ray", *CHATTY):
            logging.getLogger(name).setLevel(logging.ERROR)
        self._client: _Client | None = None
        self._print_line = print_line
        self._logs: _Logs | None = None

    def find(self, run: str) -> list[Job]:
        """The attempts of a run that the cluster knows, oldest first. Raises: HeadUnreachable, UserError."""
        jobs = self._ask(lambda client: client.list_jobs())
        mine = [job for job in jobs if job.submission_id and (job.metadata or {}).get(METADATA) == run]
        return sorted((_job(job) for job in mine), key=lambda job: job.start_s)

    def submit(self, submission_id: str, submission: Submission) -> None:
        """Submits an attempt; one of this name that is there already is left as it is.

        Raises: HeadUnreachable; SubmissionError when the cluster will never accept it; UserError.
        """
        try:
            self._ask(
                lambda client: client.submit_job(
                    entrypoint=submission.entrypoint,
                    submission_id=submission_id,
                    runtime_env=dict(submission.runtime_env),
                    metadata={METADATA: submission.run},
                )
            )
        except _RequestFailed as error:
            if "already exists" in error.text:
                return
            raise SubmissionError(f"{self.address} does not accept the job: {error}.") from error
        except ValueError as error:
            raise SubmissionError(f"the job cannot be submitted: {one_line(error)}") from error

    def state(self, submission_id: str) -> Job:
        """The newest state of an attempt; LOST when the cluster does not know it. Raises: HeadUnreachable."""
        try:
            return _job(self._ask(lambda client: client.get_job_info(submission_id)))
        except _RequestFailed as error:
            if error.status == 404:
                return Job(submission_id, Ended(Outcome.LOST))
            raise HeadUnreachable(str(error)) from error

    def show_logs(self, submission_id: str) -> None:
        """Prints the log of an attempt as it grows, from a thread; goes on where it was interrupted."""
        if self._client is None:
            return
        if self._logs is None or self._logs.submission_id != submission_id:
            self._logs = _Logs(submission_id, self._print_line)
        self._logs.follow(self._client)

    def finish_logs(self) -> None:
        """Waits for the rest of an ended attempt's log, for a few seconds at most."""
        if self._logs is not None:
            self._logs.finish()

    def _ask(self, request: Callable[[_Client], Any]) -> Any:
        try:
            return request(self._connected())
        except AuthenticationError as error:
            raise UserError(
                f"{self.address} refuses this token: {one_line(error).split(' Ensure ')[0][:300]} Set RAY_AUTH_MODE=token and put the "
                "cluster's token into ~/.ray/auth_token, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
            ) from error
        except _RequestFailed as error:
            if error.status < 500 or "already exists" in error.text:
                raise
            raise HeadUnreachable(str(error)) from error
        except (OSError, RayError, RuntimeError) as error:  # those of requests are OSErrors
            # A head that comes back may have another dashboard address.
            self._client = None
            raise HeadUnreachable(one_line(error)[:300]) from error

    def _connected(self) -> _Client:
        if self._client is None:
            try:
                self._client = _Client(self.address)
            except ValueError as error:  # the head is there and its dashboard not yet
                raise HeadUnreachable(one_line(error)[:300]) from error
        return self._client


def _job(details: JobDetails) -> Job:
    submission_id, start_s = str(details.submission_id), (details.start_time or 0) / 1000
    if not details.status.is_terminal():
        return Job(submission_id, None, details.status is JobStatus.RUNNING, start_s)
    outcome = Outcome[str(details.status)]
    message = "" if outcome is Outcome.SUCCEEDED else last_line(details.message or "")
    return Job(submission_id, Ended(outcome, details.driver_exit_code, message), start_s=start_s)


def last_line(message: str) -> str:
    """The line of a job's last words that names its error: the last one that is not about Ray's own end."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Failed|Unavailable)\b", line)]
    return (named or lines or [""])[-1][:300]


class _Logs:
    def __init__(self, submission_id: str, print_line: Callable[[str], None]):
        self.submission_id = submission_id
        self._print_line = print_line
        self._printed, self._rest = 0, ""
        self._thread: threading.Thread | None = None

    def follow(self, client: _Client) -> None:
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._run, args=(client,), daemon=True, name="job-log")
            self._thread.start()

    def finish(self) -> None:
        if self._thread is not None:
            self._thread.join(ANSWER_S / 10)
        if self._rest:
            self._print_line(self._rest)
            self._rest = ""

    def _run(self, client: _Client) -> None:
        try:
            asyncio.run(self._tail(client))
        except (OSError, RuntimeError, aiohttp.ClientError):
            return  # the head is away, which the requests for the state report; they start this again

    async def _tail(self, client: _Client) -> None:
        seen = 0
        async for chunk in client.tail_job_logs(self.submission_id):
            # The API begins at the start of the log each time.
            new = chunk[max(0, self._printed - seen) :]
            seen += len(chunk)
            self._printed = max(self._printed, seen)
            *lines, self._rest = (self._rest + new).split("\n")
            for line in lines:
                self._print_line(line)
