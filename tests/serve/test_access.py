"""Tokens, rates, TLS, origins and sizes: who may use a served policy, and how much of it."""

from __future__ import annotations

import datetime
import hashlib
import http.client
import ipaddress
import os
import socket
import ssl
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from sleeping_policy import SleepingService, observation, replica, serving, until
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from defi_client.connection import Connection
from defi_client.errors import UnreachableError
from defi_platform.config import LimitsConfig, SecurityConfig
from defi_platform.errors import ConfigError
from defi_platform.serve.connections import access
from defi_platform.serve.connections.access import Access, AccessError, Bucket, read_tokens
from defi_platform.serve.connections.checks import check_connections
from defi_platform.serve.connections.tls import server_context
from defi_platform.serve.protocols import openpi

TOKEN, OTHER = "robot-1-" + "a" * 24, "robot-2-" + "b" * 24


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    digest = hashlib.sha256(OTHER.encode()).hexdigest()
    file = tmp_path / "tokens"
    file.write_text(f"# the lab's robots\nrobot-1: {TOKEN}\n\nrobot-2: {digest}\n")
    return str(file)


def certificate(folder: Path) -> tuple[str, str]:
    """A certificate of 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "robots")])
    now = datetime.datetime.now(datetime.UTC)
    cert = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return str(folder / "cert.pem"), str(folder / "key.pem")


def post(port: int, body: bytes = b"x", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/act", body, headers)
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_openpi_clients_come_in_with_their_api_key_only(tokens: str) -> None:
    with serving(tokens=tokens) as place:
        for token in (TOKEN, OTHER):
            robot = WebsocketClientPolicy(place.url, api_key=token)
            assert robot.infer(observation(1))["actions"][0, 0] == 1
        for wrong in (None, "x" * 32, TOKEN[:-1], hashlib.sha256(OTHER.encode()).hexdigest(), "x" * 4000):
            with pytest.raises(InvalidStatus, match="401"):
                WebsocketClientPolicy(place.url, api_key=wrong)
        assert place.server.load()["counts"]["refused_401"] == 5


def test_http_needs_the_token_too_but_health_and_the_page_do_not(tokens: str) -> None:
    with serving(tokens=tokens) as place:
        status, words = post(place.port)
        assert status == 401 and "Authorization: Api-Key TOKEN" in words
        assert post(place.port, Authorization=f"Bearer {TOKEN}") == (200, "/v1/act 1")
        assert post(place.port, Authorization=f"Api-Key {OTHER}") == (200, "/v1/act 1")
        for path, status in (("/healthz", 200), ("/livez", 200), ("/", 200), ("/metadata", 401)):
            connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=60)
            connection.request("GET", path)
            assert connection.getresponse().status == status


def test_tokens_are_given_out_and_taken_back_while_the_server_runs(tokens: str, monkeypatch) -> None:
    monkeypatch.setattr("defi_platform.serve.connections.access.REREAD_S", 0.0)
    access = Access(SecurityConfig(tokens=tokens))
    assert access.admit(f"Api-Key {TOKEN}") == "robot-1"
    Path(tokens).write_text("robot-3: " + "c" * 20 + "\n")
    assert access.admit("bearer " + "c" * 20) == "robot-3"
    with pytest.raises(AccessError, match="not known"):
        access.admit(f"Api-Key {TOKEN}")
    Path(tokens).write_text("nonsense")
    assert access.admit("bearer " + "c" * 20) == "robot-3", "a damaged file changes nothing"
    os.remove(tokens)
    assert access.admit("bearer " + "c" * 20) == "robot-3"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("robot-1", "line 1: write it as `name: token`"),
        ("a: " + "x" * 20 + "\na: " + "y" * 20, "line 2: the name 'a' is there already"),
        ("a: short", "line 1: the token of 'a' has 5 characters, at least 16"),
        ("a: " + "x" * 600, "line 1: the token of 'a' cannot be sent in a header"),
        ("a: " + "xé" * 10, "line 1: the token of 'a' cannot be sent in a header"),
        ("a: " + "x" * 20 + "\nb: " + "x" * 20, "line 2: 'b' has the token of another name"),
        ("# nobody", "names no client"),
    ],
)
def test_a_tokens_file_that_does_not_fit_is_told_by_its_line(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_tokens(str(tmp_path / "tokens"))
    assert "xxx" not in str(caught.value) and "yyy" not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_tokens(str(tmp_path / "absent"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of every rate, which stands still until a test changes it."""
    now = [0.0]
    monkeypatch.setattr(access, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_each_token_has_its_own_rate(tokens: str, clock: list[float]) -> None:
    with serving(tokens=tokens, rate=2.0) as place:
        fast, other = (WebsocketClientPolicy(place.url, api_key=token) for token in (TOKEN, OTHER))
        assert [fast.infer(observation(n))["seed"] for n in range(2)] == [0, 1]
        with pytest.raises(RuntimeError, match=r"too many messages, retry after 0\.\d+ s"):
            fast.infer(observation(3))
        assert other.infer(observation(4))["seed"] == 4
        status, words = post(place.port, Authorization=f"Bearer {TOKEN}")
        assert status == 429 and "come back in" in words
        clock[0] = 0.55
        assert fast.infer(observation(5))["seed"] == 5


def test_a_batch_counts_as_many_as_it_holds(tokens: str, clock: list[float]) -> None:
    batch = {"batch": [observation(n) for n in range(6)]}
    with serving(tokens=tokens, rate=5.0) as place:
        client = WebsocketClientPolicy(place.url, api_key=TOKEN)
        assert len(client.infer(batch)["batch"]) == 6, "a batch may be larger than a burst"
        with pytest.raises(RuntimeError, match="too many messages, retry after 0"):
            client.infer(observation(1))
        assert place.server.load()["counts"].get("refused_429") is None
        status, _ = post(place.port, Authorization=f"Bearer {TOKEN}")
        assert status == 429 and place.server.load()["counts"]["refused_429"] == 1


def test_a_rate_holds_over_a_long_time(clock: list[float]) -> None:
    bucket, taken = Bucket(5.0), 0
    for _ in range(10_000):
        clock[0] += 0.01
        taken += bucket.take() == 0
    assert 500 <= taken <= 505


def test_tls_serves_websockets_and_http_and_plain_clients_get_nowhere(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    trust = ssl.create_default_context(cafile=cert)
    with serving(tls_cert=cert, tls_key=key, handshake_timeout_s=5.0) as place:
        url = place.url.replace("ws:", "wss:")
        with connect(url, ssl=trust, compression=None, proxy=None) as websocket:
            websocket.recv()
            websocket.send(openpi.pack(observation(1, size=300)))
            assert openpi.unpack(websocket.recv())["seed"] == 1
            secure = http.client.HTTPSConnection("127.0.0.1", place.port, context=trust, timeout=60)
            secure.request("POST", "/v1/act", b"abc")
            assert secure.getresponse().read() == b"/v1/act 3"
            with pytest.raises((OSError, http.client.HTTPException)):
                post(place.port)
            with Connection(url, ssl_context=trust) as client:
                assert client.infer(observation(1))[0][0, 0] == 1
            with pytest.raises(UnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
                Connection(url)
            other = replica(SleepingService())
            place.server.move(None, "answers", lambda sock, state: bool(other.adopt(sock, state)) or True)
            with pytest.raises(ConnectionClosed, match=r"1012.*connect again"):
                websocket.recv()
            other.close("the test is over", timeout_s=0.2)
        until(lambda: place.server.load()["sockets"] == 0, "all to be gone")


def test_a_renewed_certificate_is_used_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    paths = certificate(tmp_path)
    old = ssl.create_default_context(cafile=paths[0])
    with serving(tls_cert=paths[0], tls_key=paths[1]) as place:

        def greeted(trust: ssl.SSLContext) -> bool:
            with connect(place.url.replace("ws:", "wss:"), ssl=trust, proxy=None) as websocket:
                return bool(websocket.recv())

        assert greeted(old)
        Path(paths[0]).write_text("half of a file")
        assert greeted(old)
        certificate(tmp_path)
        assert greeted(ssl.create_default_context(cafile=paths[0]))
        with pytest.raises(ssl.SSLCertVerificationError):
            greeted(old)


def test_a_stricter_successor_asks_moved_clients_for_their_token(tokens: str, tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    for settings in ({"tokens": tokens}, {"tls_cert": cert, "tls_key": key}):
        other = replica(SleepingService(), **settings)
        with serving() as place, connect(place.url, proxy=None) as websocket:
            websocket.recv()
            place.server.move(
                None, "answers", lambda sock, state, to=other: bool(to.adopt(sock, state)) or True
            )
            with pytest.raises(ConnectionClosed, match=r"1012.*token or for TLS now: connect again"):
                websocket.recv()
        other.close("the test is over", timeout_s=0.2)


def test_a_certificate_that_does_not_fit_is_told_by_its_key(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    assert server_context(None, None) is None
    for wrong, words in (
        ((cert, None), "tls_cert is set, security.tls_key is not"),
        ((None, key), "tls_key is set, security.tls_cert is not"),
        ((cert, str(tmp_path / "absent")), "tls_key .*absent: No such file"),
        ((key, cert), "no certificate chain and its key"),
    ):
        with pytest.raises(ConfigError, match=words):
            server_context(*wrong)


def test_pages_of_other_hosts_and_unknown_paths_are_refused() -> None:
    with serving() as place:
        with connect(place.url, origin=f"http://127.0.0.1:{place.port}", proxy=None) as own:  # type: ignore[arg-type]
            own.recv()
        with pytest.raises(InvalidStatus, match="403"):
            connect(place.url, origin="https://evil.example", proxy=None).recv()  # type: ignore[arg-type]
        with pytest.raises(InvalidStatus) as caught:
            connect(place.url + "/nowhere", proxy=None).recv()
        assert caught.value.response.status_code == 404
        assert b"no websocket protocol at /nowhere; there are /" in caught.value.response.body


def test_bodies_and_headers_over_the_limit_are_refused_in_words() -> None:
    with serving(max_message_mib=1) as place:
        assert post(place.port, bytes(2**20)) == (200, "/v1/act 1048576")
        status, words = post(place.port, bytes(2**20 + 1))
        assert status == 413 and "limits.max_message_mib" in words
        connection = http.client.HTTPConnection("127.0.0.1", place.port, timeout=60)
        connection.request("POST", "/v1/act", iter([bytes(2**19)] * 5), encode_chunked=True)
        assert connection.getresponse().status == 413
        assert post(place.port, **{"X-Long": "x" * 40_000})[0] == 400
        assert post(place.port) == (200, "/v1/act 1")


def test_a_header_without_end_and_too_many_requests_at_once_are_cut_off() -> None:
    with serving() as place:
        for endless in (b"GET / HTTP/1.1\r\nX: ", b"GET /"):
            sock = socket.create_connection(("127.0.0.1", place.port), timeout=60)
            with pytest.raises((ConnectionError, TimeoutError)):
                sock.sendall(endless)
                for _ in range(1000):
                    sock.sendall(b"x" * 65536)
        ahead = socket.create_connection(("127.0.0.1", place.port), timeout=60)
        ahead.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        until(lambda: place.server.load()["counts"].get("refused_400") == 3, "their end")
        assert post(place.port) == (200, "/v1/act 1")


def test_bodies_count_as_memory_that_is_in_use() -> None:
    with serving(max_message_mib=4, memory_mib=8) as place:
        slow = []
        for number in range(3):
            whole = number * (3 * 2**20 - 1)
            until(lambda: place.server.load()["held_bytes"] >= whole, "the bodies before")  # noqa: B023
            sock = socket.create_connection(("127.0.0.1", place.port), timeout=60)
            head = f"POST /v1/act HTTP/1.1\r\nHost: x\r\nContent-Length: {3 * 2**20}\r\n\r\n"
            sock.sendall(head.encode() + bytes(3 * 2**20 - 1))
            slow.append(sock)
        assert slow[2].recv(1000).startswith(b"HTTP/1.1 503")
        until(lambda: place.server.load()["held_bytes"] < 8 * 2**20, "its memory")
        slow[0].sendall(b"x")
        assert slow[0].recv(1000).endswith(f"/v1/act {3 * 2**20}".encode())


def test_numbers_that_cannot_be_are_told_by_their_key() -> None:
    check_connections(LimitsConfig(action_margin=0.0), SecurityConfig(), 1)
    for limits, security, room, words in (
        (LimitsConfig(), SecurityConfig(), 0, "max_connections is 0"),
        (
            LimitsConfig(idle_timeout_s=0),
            SecurityConfig(),
            1,
            r"limits.idle_timeout_s is 0; it must be above 0",
        ),
        (
            LimitsConfig(memory_mib=20),
            SecurityConfig(),
            1,
            r"limits.memory_mib is 20; it must hold two messages",
        ),
        # A replica would be ended between two of its reports, or the watch over it fail.
        (
            LimitsConfig(stalled_after_s=0.3),
            SecurityConfig(),
            1,
            "stalled_after_s is 0.3; it must be 5 or more",
        ),
        (LimitsConfig(stalled_after_s=float("inf")), SecurityConfig(), 1, "stalled_after_s is inf"),
        (LimitsConfig(), SecurityConfig(rate=0.0), 1, r"security.rate is 0.0"),
        (LimitsConfig(), SecurityConfig(tokens="/no/such"), 1, "security.tokens /no/such: No such file"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_connections(limits, security, room)
