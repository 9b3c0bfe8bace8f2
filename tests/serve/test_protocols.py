"""The dialogues of all protocols: with real clients where they exist, and against damage."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgpack
import numpy as np
import pytest
import websockets.sync.client
from dialogues import IMAGE, LAB_OBSERVATION, lab_frame, replies, vla_eval_image, vla_message, wire_of
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from sleeping_policy import SPEC, Place, SleepingService, observation, serving
from vla_eval.connection import Connection
from vla_eval.protocol.numpy_codec import set_image_format

from defi_platform.config import ObservationKeysConfig, ServeConfig, SessionConfig
from defi_platform.errors import ConfigError
from defi_platform.serve.deployment.startup_checks import check_before_start
from defi_platform.serve.observation_keys import NAMES
from defi_platform.serve.protocols import openpi, vla_eval, xpolicylab
from defi_platform.serve.protocols.openpi_wire import OpenpiWire
from defi_platform.serve.protocols.routes import WIRES, wire_class
from defi_platform.serve.protocols.settings import check_against_policy, wire_settings
from defi_platform.serve.protocols.vla_eval import VlaEvalWire
from defi_platform.serve.protocols.wire import Reply, Wire, WireSettings
from defi_platform.serve.protocols.xpolicylab import XPolicyLabWire
from defi_platform.serve.refusals import BusyError, RateError


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with serving() as running:
        yield running


def test_paths_choose_the_protocol() -> None:
    assert {path: wire_class(path) for path in WIRES} == WIRES
    assert wire_class("/vla-eval/") is VlaEvalWire and wire_class("") is OpenpiWire
    assert wire_class("/pickle") is None


# openpi


def test_openpis_client_sends_encoded_images_and_batches(place: Place) -> None:
    policy = WebsocketClientPolicy(f"{place.url}/openpi")
    png = vla_eval_image(IMAGE, "png")
    answer = policy.infer(observation(4) | {"observation/images/front": png})
    assert (answer["actions"] == 4).all() and answer["policy_digest"] == "d0"
    answers = policy.infer({"batch": [observation(seed) for seed in range(3)]})["batch"]
    assert [float(one["actions"][0, 0]) for one in answers] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="1 to 64"):
        policy.infer({"batch": [observation(1)] * 65})


def test_options_in_the_address_make_a_session_step_by_step(place: Place) -> None:
    policy = WebsocketClientPolicy(f"{place.url}/?answers=step&open_loop=2&seed=3")
    answers = [policy.infer({**observation(0), "seed": None}) for _ in range(4)]
    assert all(answer["actions"].shape == (4,) for answer in answers)
    assert [answer["server_timing"]["open_loop_step"] for answer in answers] == [0, 1, 0, 1]
    seeds = [answer["seed"] for answer in answers]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    with pytest.raises(websockets.exceptions.InvalidStatus, match="400"):
        WebsocketClientPolicy(f"{place.url}/?answers=all")


def test_an_episode_named_by_the_client_moves_to_the_successor_at_its_first_message() -> None:
    wire = wire_of(OpenpiWire)
    first, second = (openpi.pack(observation(1) | {"episode": episode}) for episode in ("a", "b"))
    replies(wire, first)
    assert not wire.between_episodes
    wire.leaving = True
    same, other = replies(wire, first, second)
    assert not same.hand_over and other == Reply(hand_over=True)
    successor = wire_of(OpenpiWire)
    successor.resume(msgpack.unpackb(msgpack.packb(wire.state())))
    (reply,) = replies(successor, second)
    assert isinstance(reply.data, bytes) and (openpi.unpack(reply.data)["actions"] == 1).all()


def test_busy_and_words_are_text_and_the_dialogue_goes_on() -> None:
    service = SleepingService()
    wire = wire_of(OpenpiWire, service)
    refused, text, answered = replies(
        wire, openpi.pack(observation(1) | {"prompt": 2}), "hello", openpi.pack(observation(1))
    )
    assert "'prompt' is of type int" in str(refused.data) and "binary message" in str(text.data)
    assert isinstance(answered.data, bytes) and service.refusals == {"observation": 1, "protocol": 1}
    assert wire.refuse(BusyError("full", 2.0)) == Reply("busy, retry after 2.0 s: full")


# vla-eval


@pytest.mark.parametrize("form", ["raw", "png", "jpeg"])
def test_vla_evals_client_runs_episodes_with_every_image_format(place: Place, form: Any) -> None:
    set_image_format(form)

    async def episodes() -> list[Any]:
        answers = []
        async with Connection(f"{place.url}/vla-eval") as connection:
            assert connection.server_info["policy_digest"] == "d0"
            for number in range(2):
                await connection.start_episode({"task": {"name": "drawer"}})
                for _ in range(3):
                    seen = {
                        "images": {"front": IMAGE},
                        "task_description": "open the drawer",
                        "seed": number,
                    }
                    answers.append(await connection.act(seen))
                await connection.end_episode({"metrics": {"success": True}})
            with pytest.raises(RuntimeError, match="'task_description' is missing"):
                await connection.act({"images": {"front": IMAGE}})
            answers.append(await connection.act(seen))
        return answers

    try:
        answers = asyncio.run(episodes())
    finally:
        set_image_format("png")
    assert [float(answer["actions"][0]) for answer in answers] == [0, 0, 0, 1, 1, 1, 1]
    assert all(answer["actions"].shape == (4,) for answer in answers)
    # A chunk has two actions: the third step of an episode begins a new chunk, and so does the next episode.
    places = [answer["server_timing"]["open_loop_step"] for answer in answers]
    assert places == [0, 1, 0, 0, 1, 0, 0]


def test_a_vla_eval_socket_moves_between_episodes_only() -> None:
    wire = wire_of(VlaEvalWire)
    assert wire.between_episodes
    replies(wire, vla_message("episode_start"))
    assert not wire.between_episodes
    wire.leaving = True
    (again,) = replies(wire, vla_message("episode_start"))
    assert again.hand_over
    successor = wire_of(VlaEvalWire)
    successor.resume(msgpack.unpackb(msgpack.packb(wire.state())))
    assert not successor.between_episodes
    replies(successor, vla_message("episode_end"))
    assert successor.between_episodes


def test_the_policy_asks_benchmarks_for_what_it_reads_and_takes_either_name_of_the_state() -> None:
    service = SleepingService()
    service.spec = replace(SPEC, cameras=("rgb_static", "rgb_gripper"), state_dim=2)
    wire = wire_of(VlaEvalWire, service)
    (hello,) = replies(wire, vla_message("hello", {"harness_version": "x", "protocol_version": 1}))
    assert isinstance(hello.data, bytes)
    payload = vla_eval.unpack(hello.data)["payload"]
    assert payload["observation_params"] == {"send_state": True, "send_wrist_image": True}
    images = {
        name: {"__image__": True, "format": "png", "data": vla_eval_image(IMAGE, "png")}
        for name in ("rgb_static", "rgb_gripper")
    }
    for name in ("state", "states"):
        seen = {"images": images, "task_description": "go", name: [1.0, 2.0]}
        (answer,) = replies(wire_of(VlaEvalWire, service), vla_message("observation", seen, seq=9))
        assert isinstance(answer.data, bytes)
        message = vla_eval.unpack(answer.data)
        assert (message["type"], message["seq"]) == ("action", 9), message["payload"]


# XPolicyLab


def test_an_xpolicylab_trial_from_hello_to_close() -> None:
    service = SleepingService()
    service.spec = replace(SPEC, state_dim=4)
    wire = wire_of(XPolicyLabWire, service, actions={"arm_joint_state": 3, "ee_joint_state": 1})
    requests = ["hello", "prepare_case", "reset", "infer", "heartbeat", "trial_end"]
    payloads = [{"observation": LAB_OBSERVATION} if kind == "infer" else {} for kind in requests]
    answers = replies(
        wire,
        *(
            lab_frame(kind, payload, trial_id="t", step=4)
            for kind, payload in zip(requests, payloads, strict=True)
        ),
    )
    frames = [xpolicylab.unpack(cast(bytes, answer.data)) for answer in answers]
    assert [frame["message_type"] for frame in frames] == [xpolicylab.ANSWERS[kind] for kind in requests]
    assert all((frame["message_id"], frame["trial_id"], frame["step"]) == ("m1", "t", 4) for frame in frames)
    chunk = frames[3]["payload"]["actions"]
    assert len(chunk) == 2 and chunk[0]["arm_joint_state"].tolist() == [3, 3, 3]
    assert chunk[1]["ee_joint_state"].shape == (1,)
    assert wire.between_episodes
    (closed,) = replies(wire, lab_frame("close"))
    assert closed.data is None and closed.close is not None and closed.close[0] == 1000


def test_two_arms_of_xpolicylab_are_read_arm_by_arm() -> None:
    service = SleepingService()
    service.spec = replace(SPEC, state_dim=4)
    sides = {
        f"{side}_{part}_joint_state": np.zeros(1) for side in ("left", "right") for part in ("arm", "ee")
    }
    (answer,) = replies(
        wire_of(XPolicyLabWire, service),
        lab_frame("infer", {"observation": LAB_OBSERVATION | {"state": sides}}),
    )
    frame = xpolicylab.unpack(cast(bytes, answer.data))
    assert frame["message_type"] == "infer_result", frame
    assert frame["payload"]["actions"][0].tolist() == [3, 3, 3, 3]


def test_pickled_object_arrays_of_msgpack_numpy_are_not_read() -> None:
    evil = {b"nd": True, b"type": "O", b"kind": b"O", b"shape": (1,), b"data": b"cos\nsystem\n"}
    for array in (evil, {**evil, b"kind": b""}, {**evil, b"nd": False}):
        (answer,) = replies(wire_of(XPolicyLabWire), lab_frame("infer", {"observation": {"vision": array}}))
        frame = xpolicylab.unpack(cast(bytes, answer.data))
        assert frame["message_type"] == "error" and "not" in frame["payload"]["message"]


# Configuration


@pytest.mark.parametrize(
    ("session", "keys", "complaint"),
    [
        ({"answers": "all"}, {}, "chunk, step or null"),
        ({"open_loop": 0}, {}, "open_loop is 0"),
        ({"ensemble": -1.0}, {}, "ensemble is -1"),
        ({"seed": -1}, {}, "seed is -1"),
        ({"expiry_s": 0.0}, {}, "expiry_s is 0"),
        ({}, {"names": "lerobt"}, "Did you mean 'lerobot'"),
        ({}, {"prompt": "seed"}, "'seed' has a meaning of its own"),
        ({}, {"images": "{camera}/{camera}"}, "once"),
        ({}, {"actions": {"arm": 0}}, "actions.arm is 0"),
    ],
)
def test_settings_that_cannot_be_are_named(
    session: dict[str, Any], keys: dict[str, Any], complaint: str
) -> None:
    config = ServeConfig(session=SessionConfig(**session), observation_keys=ObservationKeysConfig(**keys))
    with pytest.raises(ConfigError, match=complaint):
        wire_settings(config)


def test_single_keys_come_before_the_names() -> None:
    keys = ObservationKeysConfig(names="droid", cameras={"*": "left"}, state=["joints"])
    settings = wire_settings(ServeConfig(observation_keys=keys))
    assert settings.keys == replace(NAMES["droid"], cameras={"*": "left"}, state=("joints",))
    assert wire_settings(ServeConfig()) == WireSettings()


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (
            {"cameras": {"wrst": "hand"}},
            "names 'wrst', but the policy has front, wrist .* Did you mean 'wrist'",
        ),
        ({"names": "metaworld"}, "front and wrist would both be read from 'pixels'"),
        ({"cameras": {"front": "observation/images/wrist"}}, "both be read from 'observation/images/wrist'"),
        ({"actions": {"arm": 6}}, "names 6 numbers in all; an action of the policy has 7"),
    ],
)
def test_names_that_are_not_the_policys_are_found_before_it_is_served(
    keys: dict[str, Any], complaint: str
) -> None:
    settings = wire_settings(ServeConfig(observation_keys=ObservationKeysConfig(**keys)))
    with pytest.raises(ConfigError, match=complaint):
        check_against_policy(settings, ("front", "wrist"), 7)


def test_names_of_the_policy_are_read_from_its_folder(policy_folder: Path) -> None:
    def config(**keys: Any) -> ServeConfig:
        return ServeConfig(policy=str(policy_folder), observation_keys=ObservationKeysConfig(**keys))

    check_before_start(config(cameras={"front": "image"}, actions={"arm": 3, "hand": 1}))
    with pytest.raises(ConfigError, match="the policy has front"):
        check_before_start(config(cameras={"wrist": "image"}))


def test_a_message_over_the_rate_is_refused_by_its_own_name() -> None:
    service = SleepingService()
    refusal = RateError(0.5)

    def turned_away(wire: Wire, message: bytes) -> Any:
        return asyncio.run(wire.turn_away(message, refusal))

    lab = wire_of(XPolicyLabWire, service)
    replies(lab, lab_frame("hello"))
    frame = xpolicylab.unpack(turned_away(lab, lab_frame("infer", message_id="m2")).data)
    assert (frame["message_type"], frame["message_id"]) == ("error", "m2")
    assert "retry after 0.50 s" in frame["payload"]["message"]
    arm = wire_of(VlaEvalWire, service)
    message = vla_eval.unpack(turned_away(arm, vla_message("observation", {"images": {}}, seq=7)).data)
    assert (message["type"], message["seq"]) == ("error", 7)
    assert turned_away(arm, vla_message("episode_start")) == Reply() and not arm.between_episodes
    assert isinstance(turned_away(wire_of(OpenpiWire, service), b"").data, str)
    assert service.refusals == {"rate": 3}
