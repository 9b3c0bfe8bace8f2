"""One observation a request, over HTTP; in process, without sockets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, cast

import httpx
import pytest
from openapi_spec_validator import validate
from openpi_client import msgpack_numpy
from PIL import Image
from sleeping_policy import SPEC, SleepingService, observation

from defi_platform.serve.connections.access import Bucket
from defi_platform.serve.http.app import http_app
from defi_platform.serve.inference.service import ActionService
from defi_platform.serve.observation_keys import NAMES
from defi_platform.serve.protocols.wire import SPEND, WireSettings
from defi_platform.serve.refusals import BusyError, DeadlineError, PolicyFailure

Ask = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]


def ask(request: Ask, service: SleepingService | None = None, **settings: Any) -> httpx.Response:
    """The response to one request of an application."""
    app = http_app(cast(ActionService, service or SleepingService()), **settings)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://policy") as client:
            return await request(client)

    return asyncio.run(run())


def file_of(kind: str = "PNG", size: tuple[int, int] = (30, 20)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(stream, kind)
    return stream.getvalue()


def as_json(**changes: Any) -> dict[str, Any]:
    image = base64.b64encode(file_of()).decode()
    return {"observation/images/front": image, "prompt": "open the drawer", "seed": 5} | changes


def act(**changes: Any) -> Ask:
    return lambda client: client.post("/v1/act", json=as_json(**changes))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
def test_json_with_a_base64_image_is_answered_by_json(kind: str, head: str) -> None:
    image = head + base64.b64encode(file_of(kind)).decode()
    response = ask(act(**{"observation/images/front": image, "depth": 1}))
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["actions"] == [[5.0] * 4] * 2 and answer["seed"] == 5
    assert answer["policy_digest"] == "d0" and answer["ignored"] == ["depth"]
    assert answer["server_timing"]["batch_size"] == 1


def test_msgpack_is_answered_by_msgpack_unless_json_is_accepted() -> None:
    body = msgpack_numpy.packb(observation(6))
    packed = ask(
        lambda client: client.post("/v1/act", content=body, headers={"content-type": "application/x-msgpack"})
    )
    answer = msgpack_numpy.unpackb(packed.content)
    assert packed.headers["content-type"] == "application/msgpack" and (answer["actions"] == 6).all()
    text = ask(
        lambda client: client.post(
            "/v1/act",
            content=body,
            headers={"content-type": "application/msgpack", "accept": "application/json"},
        )
    )
    assert text.json()["actions"][0] == [6.0] * 4


def test_a_batch_is_answered_by_a_batch_and_counts_as_many_as_it_holds() -> None:
    batch, service, bucket = [as_json(seed=seed) for seed in (1, 2, 3)], SleepingService(), Bucket(2.0)
    app = http_app(cast(ActionService, service))

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        await app(scope | {SPEND: bucket.spend}, receive, send)

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(guarded), base_url="http://policy"
        ) as client:
            return await client.post("/v1/act", json={"batch": batch})

    assert bucket.take() == 0
    response = asyncio.run(run())
    assert [answer["actions"][0][0] for answer in response.json()["batch"]] == [1.0, 2.0, 3.0]
    assert len(service.decoded_ms) == 3 and 0.5 < bucket.take() <= 1.0


@pytest.mark.parametrize(
    ("content", "status", "complaint"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 15_000, 400, "not JSON"),
        (b"[" + b"{}," * 100_000 + b"{}]", 400, "at most 20000 values"),
        (b'{"seed": NaN}', 400, "no number of JSON"),
        (b'{"seed": ' + b"[" * 400 + b"]" * 400 + b"}", 400, "at most 16 deep"),
        (json.dumps(as_json(prompt="\ud800")).encode(), 400, "half of a surrogate pair"),
        (b'{"\xed\xa0\x80": 1}', 400, "half of a surrogate pair"),
        (b"[1]", 422, "got of type list"),
        (json.dumps(as_json(seed=10**300)).encode(), 422, "an integer of 997 bits"),
        (json.dumps(as_json(slack_ms=-1)).encode(), 422, "'slack_ms' is -1"),
        (json.dumps(as_json(deadline_ms="soon")).encode(), 422, "'deadline_ms' is 'soon'"),
        (json.dumps(as_json(**{"observation/images/front": "no base64!"})).encode(), 422, "not base64"),
        (json.dumps(as_json(**{"observation/images/front": "aGVsbG8="})).encode(), 422, "no PNG or JPEG"),
        (json.dumps({"batch": []}).encode(), 422, "1 to 64"),
        (json.dumps({"batch": [as_json(), 3]}).encode(), 422, r"batch\[1\]: an observation is a map"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_words(content: bytes, status: int, complaint: str) -> None:
    service = SleepingService()
    response = ask(lambda client: client.post("/v1/act", content=content), service)
    assert response.status_code == status and len(response.content) < 3000
    assert re.search(complaint, response.json()["error"])
    assert service.asked == 0 and sum(service.refusals.values()) == 1


def test_a_form_is_refused_in_words() -> None:
    form = ask(lambda client: client.post("/v1/act", data={"a": "b"}))
    assert form.status_code == 400 and "send application/json" in form.json()["error"]


@pytest.mark.parametrize(
    ("refusal", "status"),
    [
        (BusyError("256 observations wait", 0.2), 503),
        (DeadlineError("no answer within 5 ms"), 504),
        (PolicyFailure("the policy gave actions that are not finite"), 500),
    ],
)
def test_refusals_of_the_service_have_their_status(refusal: Exception, status: int) -> None:
    service = SleepingService()

    async def refuse(observation: Any, **options: Any) -> Any:
        raise refusal

    service.act = refuse  # type: ignore[method-assign]
    response = ask(act(), service)
    assert response.status_code == status and response.json()["error"] == str(refusal)
    assert response.headers.get("retry-after") == ("1" if status == 503 else None)


def test_a_client_that_hangs_up_gives_up_its_place() -> None:
    service = SleepingService(sleep_s=60.0)
    request = {"type": "http.request", "body": json.dumps(as_json()).encode(), "more_body": False}
    messages: list[dict[str, Any]] = [request, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": "POST", "path": "/v1/act", "query_string": b"", "headers": []}

    async def receive() -> dict[str, Any]:
        while len(messages) == 1 and not service.asked:
            await asyncio.sleep(0)
        return messages.pop(0)

    async def send(message: Any) -> None:
        pass

    asyncio.run(http_app(cast(ActionService, service))(scope, receive, send))
    assert (service.asked, service.given_up) == (1, 1)


def test_a_client_with_other_names_needs_only_the_configuration() -> None:
    image = base64.b64encode(file_of()).decode()
    message = {"observation.images.front": image, "task": "open the drawer", "seed": 9}
    wires = WireSettings(keys=NAMES["lerobot"])
    response = ask(lambda client: client.post("/v1/act", json=message), wires=wires)
    assert response.json()["actions"][0] == [9.0] * 4 and "ignored" not in response.json()


def test_json_of_a_policy_with_an_unnamed_camera_has_one_image_beside_state_and_prompt() -> None:
    service = SleepingService()
    service.spec = replace(SPEC, cameras=("*",), state_dim=3)
    image = as_json()["observation/images/front"]
    state = {"observation/joint_position": [1, 2], "observation/gripper_position": [3]}
    message = {"observation/wrist_image_left": image, "prompt": "go", "seed": 4, **state}
    response = ask(
        lambda client: client.post("/v1/act", json=message), service, wires=WireSettings(keys=NAMES["droid"])
    )
    assert response.status_code == 200 and "ignored" not in response.json()


def test_a_seed_that_is_drawn_here_is_exact_in_any_reader_of_json() -> None:
    assert ask(act(seed=None)).json()["seed"] < 2**53


def test_ready_and_alive_are_apart_and_metadata_names_the_keys() -> None:
    starting = ask(lambda client: client.get("/healthz"), ready=lambda: "starting")
    assert starting.status_code == 503 and starting.json() == {"status": "starting"}
    assert ask(lambda client: client.get("/livez"), ready=lambda: "starting").status_code == 200
    assert ask(lambda client: client.get("/healthz")).json() == {"status": "ok", "policy_digest": "d0"}
    keys = ask(lambda client: client.get("/metadata")).json()["keys"]
    assert keys["images"] == {"front": "observation/images/front"} and keys["prompt"] == "prompt"


def test_the_description_is_openapi_and_describes_this_policy() -> None:
    description = ask(lambda client: client.get("/openapi.json")).json()
    validate(description)
    body = description["paths"]["/v1/act"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["oneOf"][0]["required"] == ["observation/images/front", "prompt"]
    assert set(description["paths"]) == {"/v1/act", "/healthz", "/livez", "/metadata"}


@pytest.mark.parametrize("path", ["/", "/docs", "/pages/try.js", "/pages/docs.js", "/pages/page.css"])
def test_pages_are_whole_in_themselves(path: str) -> None:
    page = ask(lambda client: client.get(path))
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    outside = [word for word in ("http:", "https:", "//cdn") if f"{word}//" in page.text.replace(SVG, "")]
    assert not outside


SVG = "http://www.w3.org/2000/svg"


@pytest.mark.parametrize("path", ["/healthz", "/-/healthz", "/livez"])
def test_health_is_asked_by_get_and_by_head(path: str) -> None:
    for why, status in ((None, 200), ("this replica is leaving", 200 if path == "/livez" else 503)):
        got = ask(lambda client: client.get(path), ready=lambda: why)  # noqa: B023
        head = ask(lambda client: client.head(path), ready=lambda: why)  # noqa: B023
        assert got.status_code == head.status_code == status
    assert ("success" in ask(lambda client: client.get("/-/healthz")).text) is True
