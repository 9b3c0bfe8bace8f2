"""Logs: text by default; with DEFI_LOG=json every line of a job is an object that says what it is about."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from defi_platform import logs
from defi_platform.errors import UNREAD, ConfigError, exit_code
from defi_platform.logs import JsonLines
from defi_platform.progress import Progress


@pytest.fixture
def as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "json")
    monkeypatch.setenv(logs.JOB, "before")
    monkeypatch.setenv("RAY_DEDUP_LOGS", "1")


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def shown(line: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {name: line[name] for name in fields if name in line}


def test_text_is_what_was_said_and_leaves_details_out(capsys: pytest.CaptureFixture[str]) -> None:
    with logs.job_log("ingest_videos"), logs.about(run="r"):
        logs.say("two videos", corpus="bridge")
        logs.detail("sample 7 is bad", sample=7)
        logs.error("no room")
    assert capsys.readouterr() == ("two videos\n", "no room\n")


def test_an_object_says_what_it_is_about(as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    with logs.job_log("pretrain"), logs.about(run="runs/a", corpus="all"):
        logs.say("two\nlines", corpus="bridge", sample=7, video_id=None)
    (line,) = objects(capsys.readouterr().out)
    assert shown(line, "levelname", "message", "process", "job", "run", "corpus", "sample", "video_id") == {
        "levelname": "INFO",
        "message": "two\nlines",
        "process": os.getpid(),
        "job": "pretrain",
        "run": "runs/a",
        "corpus": "bridge",
        "sample": 7,
    }
    assert line["asctime"].startswith("20") and line["timestamp_ns"] > 1.7e18


def test_whatever_else_a_job_prints_is_an_object_too(
    as_json: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with logs.job_log("pretrain"):
        print("a table\n  of two lines\n")
        print("careful", file=sys.stderr)
        sys.stdout.write("in ")
        sys.stdout.write("pieces\n")
    out, err = capsys.readouterr()
    assert [line["message"] for line in objects(out)] == ["a table", "  of two lines", "in pieces"]
    assert [shown(line, "message", "levelname") for line in objects(err)] == [
        {"message": "careful", "levelname": "WARNING"}
    ]


def test_a_line_that_never_ends_is_an_object_too(as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    with logs.job_log("pretrain"):
        sys.stdout.write("10 %\r20 %\r")
        sys.stdout.write("the last words")
        begun = threading.Thread(target=lambda: sys.stderr.write("of a thread"))
        begun.start()
        begun.join()
    out, err = capsys.readouterr()
    assert [line["message"] for line in objects(out)] == ["10 %", "20 %", "the last words"]
    assert [line["message"] for line in objects(err)] == ["of a thread"]


def test_lines_of_workers_lose_rays_prefix_and_keep_what_it_says() -> None:
    stream = io.StringIO()
    lines = JsonLines(stream, "INFO")
    lines.write('\x1b[36m(RayTrainWorker pid=12, ip=10.0.0.3)\x1b[0m {"message": "step 1", "process": 12}\n')
    lines.write("(MapWorker(MapBatches(SampleDecoder)) pid=13) plain text\n")
    lines.write("(autoscaler +3s) Adding 1 node(s) of type train.\n")
    lines.write("(see docs/serving.md) in brackets\n")
    lines.write('{"half an object\n')
    lines.write('["no object"]\n')
    found = objects(stream.getvalue())
    assert found[0] == {"message": "step 1", "process": 12, "worker": "RayTrainWorker", "ip": "10.0.0.3"}
    assert shown(found[1], "message", "process", "worker") == {
        "message": "plain text",
        "process": 13,
        "worker": "MapWorker(MapBatches(SampleDecoder))",
    }
    assert shown(found[2], "message", "worker") == {
        "message": "Adding 1 node(s) of type train.",
        "worker": "autoscaler +3s",
    }
    assert [line["message"] for line in found[3:]] == [
        "(see docs/serving.md) in brackets",
        '{"half an object',
        '["no object"]',
    ]


def test_threads_do_not_write_into_each_others_lines() -> None:
    stream = io.StringIO()
    lines = JsonLines(stream, "INFO")

    def write(name: str) -> None:
        for number in range(200):
            lines.write(name)
            lines.write(f" {number}")
            lines.write("\n")

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    messages = [line["message"] for line in objects(stream.getvalue())]
    for name in "abc":
        assert [m for m in messages if m[0] == name] == [f"{name} {number}" for number in range(200)]
    assert len(messages) == 600


def test_a_progress_display_gives_its_numbers(
    as_json: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("defi_platform.progress.FIRST_S", 0.01)
    shown_once = threading.Event()
    with logs.job_log("ingest_videos"):
        progress = Progress("ingest: opened", "files", 9, publish=lambda _: shown_once.set(), corpus="bridge")
        with progress:
            progress.step(4)
            assert shown_once.wait(60)
            printed, deadline = "", time.monotonic() + 60
            while not printed.endswith("\n") and time.monotonic() < deadline:
                printed += capsys.readouterr().out
    (line, *_) = objects(printed)
    assert shown(line, "corpus", "done", "total", "job") == {
        "corpus": "bridge",
        "done": 4,
        "total": 9,
        "job": "ingest_videos",
    }
    assert line["message"].startswith("ingest: opened 4 of 9 files")


def test_a_users_error_is_an_object_of_level_error(as_json: None, capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> int:
        raise ConfigError("set this")

    assert exit_code(job) == 2
    (line,) = objects(capsys.readouterr().err)
    assert shown(line, "levelname", "message") == {"levelname": "ERROR", "message": "ConfigError: set this"}


def test_another_kind_of_log_is_refused_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(logs.VARIABLE, "jsno")
    assert exit_code(lambda: 0) == 2
    assert "variable DEFI_LOG is 'jsno'; it is text or json" in capsys.readouterr().err


def test_a_reader_that_has_gone_ends_a_job_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lost_elsewhere() -> int:
        raise BrokenPipeError

    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(BrokenPipeError):  # of a pipe of the job's own
            exit_code(lost_elsewhere)
        os.close(reader)  # as `| head` does
        for lines in (1, 10_000):
            assert exit_code(lambda lines=lines: print("line\n" * lines) or 0) == UNREAD
            output.flush()  # what is left goes nowhere
            os.dup2(_without_reader(), writer)
    assert capsys.readouterr().err == ""


def _without_reader() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def test_processes_on_other_nodes_are_given_the_same_variables(
    as_json: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with logs.job_log("pretrain"):
        assert logs.variables() == {"DEFI_LOG": "json", "DEFI_LOG_JOB": "pretrain"}
    monkeypatch.setenv(logs.VARIABLE, "text")
    assert logs.variables() == {}


def test_an_error_of_the_program_is_one_object_with_its_traceback() -> None:
    code = (
        "from defi_platform.errors import exit_code\n"
        "def job():\n    print('begins')\n    raise RuntimeError('two\\nlines')\n"
        "exit_code(job)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, logs.VARIABLE: "json"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 1
    assert [line["message"] for line in objects(done.stdout)] == ["begins"]
    (line,) = objects(done.stderr)
    assert line["levelname"] == "ERROR" and line["message"] == "RuntimeError: two\nlines"
    assert "in job" in line["exc_text"]
