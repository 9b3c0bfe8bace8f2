"""The client of Ray's job API, against a server that answers as a head does in good and bad times."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import ray

from defi_platform.errors import UserError
from defi_platform.supervise import ray_jobs
from defi_platform.supervise.attempts import Outcome, Submission
from defi_platform.supervise.ray_jobs import HeadUnreachable, RayJobs, SubmissionError

RUN = Submission(run="pretrain-1", entrypoint="python jobs/pretrain.py")
VERSION = json.dumps({"version": "4", "ray_version": ray.__version__, "ray_commit": "x", "session_name": "s"})


class Head:
    """Answers by path, the last answer for paths that are not set."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str]] = {"/api/version": (200, VERSION)}
        head = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self.rfile.read(length)
                status, text = head.answers.get(self.path, (404, "not found"))
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            do_POST = do_GET

            def log_message(self, format: str, *arguments: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    for name in ray_jobs.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    server = Head()
    yield server
    server.server.shutdown()
    server.server.server_close()


def details(**values: Any) -> str:
    base = {"type": "SUBMISSION", "submission_id": "pretrain-1-1", "entrypoint": "x", "start_time": 5000}
    return json.dumps({**base, "metadata": {"defi_run": "pretrain-1"}, **values})


def test_states_come_with_the_exit_code_and_the_line_that_names_the_error(head: Head) -> None:
    jobs = RayJobs(head.url, print)
    head.answers["/api/jobs/pretrain-1-1"] = (200, details(status="RUNNING"))
    assert jobs.state("pretrain-1-1").is_running
    words = "Job entrypoint command failed with exit code 2, last available logs:\nConfigError: no key\n(pid=7) bye"
    head.answers["/api/jobs/pretrain-1-1"] = (
        200,
        details(status="FAILED", message=words, driver_exit_code=2),
    )
    ended = jobs.state("pretrain-1-1").ended
    assert ended is not None and (ended.outcome, ended.exit_code) == (Outcome.FAILED, 2)
    assert ended.text() == "failed with exit code 2: ConfigError: no key"


def test_a_head_that_has_forgotten_the_job_has_lost_it(head: Head) -> None:
    ended = RayJobs(head.url, print).state("pretrain-1-1").ended
    assert ended is not None and ended.outcome is Outcome.LOST


def test_only_attempts_of_the_run_are_found(head: Head) -> None:
    other = details(status="RUNNING", submission_id="other", metadata={})
    head.answers["/api/jobs/"] = (200, f"[{other}, {details(status='RUNNING')}]")
    assert [job.submission_id for job in RayJobs(head.url, print).find("pretrain-1")] == ["pretrain-1-1"]


@pytest.mark.parametrize(("status", "error"), [(500, HeadUnreachable), (400, SubmissionError)])
def test_a_head_that_is_not_up_yet_is_waited_for_and_a_refusal_is_not(
    head: Head, status: int, error: type[Exception]
) -> None:
    head.answers["/api/jobs/"] = (status, "No available agent to submit job")
    with pytest.raises(error, match="No available agent"):
        RayJobs(head.url, print).submit("pretrain-1-1", RUN)


def test_an_attempt_that_another_supervisor_has_submitted_is_as_good(head: Head) -> None:
    head.answers["/api/jobs/"] = (
        500,
        "ValueError: Job with submission_id pretrain-1-1 already exists. Please use",
    )
    RayJobs(head.url, print).submit("pretrain-1-1", RUN)


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused_is_an_error_that_says_where_it_belongs(head: Head, status: int) -> None:
    head.answers["/api/version"] = (status, "Unauthorized")
    with pytest.raises(UserError, match="RAY_AUTH_MODE=token"):
        RayJobs(head.url, print).find("pretrain-1")


def test_no_head_and_a_silent_head_are_waited_for(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = RayJobs("http://127.0.0.1:9", print)
    with pytest.raises(HeadUnreachable):
        jobs.find("pretrain-1")
    monkeypatch.setattr(ray_jobs, "ANSWER_S", 0.2)
    release = threading.Event()

    def silent(self: Any, request: Any, client: Any) -> None:
        release.wait(10)

    monkeypatch.setattr(ThreadingHTTPServer, "process_request_thread", silent)
    try:
        with pytest.raises(HeadUnreachable, match=r"timed out|Timeout"):
            RayJobs(head.url, print).find("pretrain-1")
    finally:
        release.set()


def test_the_address_that_is_given_goes_before_the_environment(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    head.answers["/api/jobs/"] = (200, "[]")
    assert RayJobs(head.url, print).find("pretrain-1") == []


def test_a_log_that_is_taken_up_again_is_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        chunks = ("step 1\nst", "ep 2\n")

        async def tail_job_logs(self, job: str) -> Any:
            for chunk in self.chunks:
                yield chunk
            raise RuntimeError("WebSocket connection closed unexpectedly")

    lines: list[str] = []
    logs = ray_jobs._Logs("pretrain-1-1", lines.append)
    client: Any = Client()
    logs._run(client)
    client.chunks = ("step 1\nstep 2\nstep 3\nthe e", "nd")
    logs._run(client)
    logs.finish()
    assert lines == ["step 1", "step 2", "step 3", "the end"]
