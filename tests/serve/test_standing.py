"""What a cluster serves already, and what jobs that were killed have left."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from defi_platform.config import ServeConfig
from defi_platform.errors import ServeError
from defi_platform.serve.deployment import server, standing
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


def jobs(monkeypatch: pytest.MonkeyPatch, **dead: int) -> None:
    """A cluster whose job table has these jobs, 1 for those that have ended; this process is the job `mine`."""
    table = [{"JobID": name, "IsDead": bool(is_dead)} for name, is_dead in dead.items()]
    monkeypatch.setattr(standing.state, "jobs", lambda: table)
    monkeypatch.setattr(standing, "this_job", lambda: "mine")


def test_another_address_on_the_same_cluster_is_refused_in_words() -> None:
    standing.same_address(RECORD, ServeConfig(policy="/policies/b", port=8000))
    with pytest.raises(ServeError, match=r"already serves the policy /policies/a at 127\.0\.0\.1:8000"):
        standing.same_address(RECORD, ServeConfig(policy="/policies/b", port=8001))


def test_a_server_is_another_job_s_while_that_job_lives_and_abandoned_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs(monkeypatch, mine=0, theirs=0, killed=1)
    records = {
        job: dataclasses.replace(RECORD, job=job) for job in ("mine", "theirs", "killed", "forgotten", "")
    }
    others = [job for job, record in records.items() if standing.serves_for_another(record)]
    assert others == ["theirs", ""], "Serve's own command needs no job to go on"
    assert [job for job, record in records.items() if standing.is_abandoned(record)] == [
        "killed",
        "forgotten",
    ]


def test_what_a_killed_job_has_left_at_another_address_is_replaced(
    monkeypatch: pytest.MonkeyPatch, done: list[str]
) -> None:
    jobs(monkeypatch, mine=0, theirs=0, killed=1)
    monkeypatch.setattr(server, "check_before_start", lambda config: None)
    monkeypatch.setattr(server, "policy_digest", lambda policy, acting: "b" * 64)
    monkeypatch.setattr(server, "_deploy_first", lambda config, digest: done.append(f"deploy {config.port}"))
    for job in ("theirs", "killed"):
        monkeypatch.setattr(registry, "read", lambda job=job: dataclasses.replace(RECORD, job=job))
        if job == "theirs":
            with pytest.raises(ServeError, match="already serves the policy"):
                server.deploy(ServeConfig(policy="/policies/b", port=8001))
            assert done == []
        else:
            server.deploy(ServeConfig(policy="/policies/b", port=8001))
            assert done[-3:] == ["stop listeners", "clear", "deploy 8001"]


@pytest.mark.parametrize("job", ["theirs", "mine"])
def test_an_evaluation_uses_the_server_of_a_living_job_and_neither_replaces_nor_stops_it(
    monkeypatch: pytest.MonkeyPatch, done: list[str], job: str
) -> None:
    jobs(monkeypatch, mine=0, theirs=0)
    record = dataclasses.replace(RECORD, job=job)
    monkeypatch.setattr(registry, "read", lambda: record)
    monkeypatch.setattr(server, "check_before_start", lambda config: None)
    monkeypatch.setattr(
        server, "_reached", lambda found: server.PolicyServer("127.0.0.1", 8000, False, found)
    )
    monkeypatch.setattr(server, "policy_digest", lambda policy, acting: policy[-1] * 64)
    with server.deploy(ServeConfig(policy="/policies/d", port=0), guest=True) as found:
        assert found.deployment is record
    assert done == []
    with pytest.raises(ServeError, match=r"serves the policy /policies/a .* an evaluation does not replace"):
        server.deploy(ServeConfig(policy="/policies/b", port=8000), guest=True)
    assert done == []
