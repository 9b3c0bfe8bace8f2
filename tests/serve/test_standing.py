"""What a cluster serves already, and what jobs that were killed have left."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from defi_platform.config import ServeConfig
from defi_platform.errors import ServeError
from defi_platform.serve.deployment import standing
from defi_platform.serve.listener import registry
from defi_platform.serve.listener.registry import Deployment

RECORD = Deployment(
    application="policy-new",
    generation=2,
    digest="d" * 64,
    policy="/policies/a",
    host="127.0.0.1",
    port=8000,
    secret="00",
    owner="job",
    retiring=("policy-old",),
)


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been done to a cluster with the application of RECORD, its predecessor and two that it does not name."""
    done: list[str] = []
    names = {
        "policy-new": "RUNNING",
        "policy-old": "RUNNING",
        "policy-cut-short": "DEPLOYING",
        "other": "RUNNING",
    }
    applications = {name: SimpleNamespace(status=status) for name, status in names.items()}
    monkeypatch.setattr(standing.serve, "status", lambda: SimpleNamespace(applications=applications))
    monkeypatch.setattr(standing.serve, "delete", lambda name: done.append(f"delete {name}"))
    monkeypatch.setattr(standing.serve, "shutdown", lambda: done.append("shutdown"))
    monkeypatch.setattr(standing, "stop_listeners", lambda: done.append("stop listeners"))
    monkeypatch.setattr(registry, "clear", lambda: done.append("clear"))
    return done


def test_a_server_is_found_again_unless_its_job_was_killed_while_it_ended(
    done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "read", lambda: RECORD)
    assert standing.find_standing() is RECORD and not done
    monkeypatch.setattr(registry, "read", lambda: dataclasses.replace(RECORD, ending=True))
    assert standing.find_standing() is None
    ours = [f"delete {name}" for name in ("policy-new", "policy-old", "policy-cut-short")]
    assert done == [*ours, "stop listeners", "clear"], "Serve goes on for the application that is not ours"


def test_successors_that_never_took_over_are_ended(done: list[str]) -> None:
    standing.delete_unknown(RECORD)
    assert done == ["delete policy-cut-short"]


def test_another_address_on_the_same_cluster_is_refused_in_words() -> None:
    standing.same_address(RECORD, ServeConfig(policy="/policies/b", port=8000))
    with pytest.raises(ServeError, match=r"already serves the policy /policies/a at 127\.0\.0\.1:8000"):
        standing.same_address(RECORD, ServeConfig(policy="/policies/b", port=8001))
