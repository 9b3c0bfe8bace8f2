"""Access to the cluster from outside: its token, its dashboard, the port of a served policy."""

from __future__ import annotations

import ipaddress
import urllib.error
import urllib.request
from collections.abc import Mapping

from defi_platform.preflight.findings import Finding, by_value, fail, named, ok, skip, warn

JOBS_PATH = "/api/jobs/"
TIMEOUT_S = 10.0


def answer_without_token(dashboard: str) -> int | str:
    """The dashboard's answer to a stranger who asks for its jobs: an HTTP status, or why there was none.

    Args:
        dashboard: host:port, or a URL.
    """
    url = (dashboard if "://" in dashboard else f"http://{dashboard}").rstrip("/") + JOBS_PATH
    try:
        # Without the proxies of the environment: it is a machine of ours.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=TIMEOUT_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError as error:
        return str(error)


def judge_token(modes: Mapping[str, bool], dashboard: str, answer: int | str, local: bool) -> list[Finding]:
    """Judges whether strangers are kept out.

    Args:
        modes: node or client -> whether its processes ask for Ray's token.
        dashboard: its address; "" where there is none.
        answer: of `answer_without_token`.
        local: whether the nodes can be reached from this machine only.
    """
    findings = []
    without = [node for node, token in modes.items() if not token]
    fix = (
        "Set RAY_AUTH_MODE=token on every machine before `ray start`, with the same ~/.ray/auth_token "
        "(`ray get-auth-token --generate`)."
    )
    if without:
        danger = (
            "only this machine reaches the cluster"
            if local
            else "whoever reaches its ports can run code there"
        )
        make = warn if local else fail
        findings.append(
            make("token", f"no token is asked for on {named(without, len(modes))}: {danger}. {fix}")
        )
    if dashboard and answer == 200 and not without:
        findings.append(fail("token", f"the dashboard at {dashboard} answers without a token. {fix}"))
    if dashboard and not isinstance(answer, int):
        findings.append(
            warn(
                "dashboard",
                f"{dashboard} does not answer this client ({answer}): `ray job submit` needs it. Open the port, or "
                f"submit from the head's machine.",
            )
        )
    if findings:
        return findings
    kept = f"; the dashboard at {dashboard} answers {answer} without it" if dashboard else ""
    return [ok("token", f"asked for by all {len(modes)} processes that were asked{kept}")]


def judge_ports(port: int | None, problems: Mapping[str, str], served: str) -> list[Finding]:
    """Judges whether a policy can be served at its port.

    Args:
        port: to listen on; None: the job serves nothing.
        problems: node -> why it cannot listen there; "" where it can.
        served: address at which the cluster serves a policy already, which the job would replace; "" for none.
    """
    if port is None:
        return [skip("ports", "the job listens on none")]
    if served:
        return [ok("ports", f"{served}: the cluster serves a policy there, which the job replaces")]
    findings = [
        fail("ports", f"{named(nodes, len(problems))}: {problem}")
        for problem, nodes in by_value(problems).items()
        if problem
    ]
    return findings or [ok("ports", f"port {port} is free")]


def is_local(addresses: list[str]) -> bool:
    """Whether all addresses are those of this machine's loopback."""
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)
