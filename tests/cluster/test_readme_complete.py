"""No command of the README is without a test that runs it; those that take no time are run here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from readme import README, commands, python_blocks

TESTS = Path(__file__).resolve().parents[1]

RUN_BY = {
    "make demo-cluster": "cluster/test_cluster_demo.py",
    "make demo": "test_demo.py",
    "make test": "../.ci/run",
    "make docs": "test_docs.py",
    "python cluster/local.py": "cluster/test_local_cluster.py",
    "python jobs/": "cluster/test_readme_jobs.py",
    "python -m defi_models.describe": "models/test_describe.py",
    "python -m defi_models.convert": "models/test_convert.py",
    "python -m defi_models.parity": "models/test_parity.py",
    "serve run": "serve/test_commands.py",
    "export DEFI_HOME": "cluster/test_readme_commands.py",
    "export RAY_AUTH_MODE": "cluster/test_readme_commands.py",
    "ray get-auth-token": "cluster/test_readme_commands.py",
    "ray start": "cluster/test_readme_commands.py",
    "ray job submit": "cluster/test_readme_commands.py",
    "source .venv/bin/activate": "cluster/test_readme_commands.py",
}
"""Start of a command -> the file that runs it."""


def sections() -> list[str]:
    return re.findall(r"^## (.+)$", README, flags=re.MULTILINE)


def test_every_command_has_a_test() -> None:
    written = [command for section in sections() for command in commands(section)]
    written += commands("")
    assert len(written) > 20
    unknown = [command for command in written if not any(command.startswith(start) for start in RUN_BY)]
    assert unknown == []
    unused = [start for start in RUN_BY if not any(command.startswith(start) for command in written)]
    assert unused == []
    assert [file for file in RUN_BY.values() if not (TESTS / file).is_file()] == []


def test_every_job_of_the_readme_is_a_line_that_the_jobs_test_runs() -> None:
    """Those files name each line by the part that it begins with."""
    source = "".join((TESTS / name).read_text() for name in ("cluster/test_readme_jobs.py", "test_demo.py"))
    jobs = {
        re.match(r"python jobs/(\w+)\.py", command)[1]  # type: ignore[index]
        for section in sections()
        for command in commands(section)
        if command.startswith("python jobs/")
    }
    served = {"serve_policy"}  # runs until Ctrl-C: serve/test_commands.py
    assert {job for job in jobs - served if not re.search(rf'jobs/{job}\.py|"{job}"', source)} == set()


def test_the_models_are_imported_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from defi_models import presets
    from defi_models.policy import DeFIPolicy

    policy = DeFIPolicy(presets.policy("nano", cameras=["workspace"]))
    policy.save_pretrained(tmp_path / "runs" / "demo" / "policy" / "model")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    (code,) = python_blocks("The models by themselves")
    exec(code, names)
    assert isinstance(names["policy"], DeFIPolicy)


def test_the_robot_s_lines_are_python_and_name_what_the_client_has() -> None:
    (code,) = python_blocks("Step by step")
    compile(code, "README.md", "exec")
    from openpi_client.websocket_client_policy import WebsocketClientPolicy

    assert callable(WebsocketClientPolicy.infer)


@pytest.mark.parametrize("section", ["", "Step by step"])
def test_commands_are_found_in_a_section(section: str) -> None:
    assert commands(section)
