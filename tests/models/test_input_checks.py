"""Each public call of each model, given each kind of bad input: the message names the key, expected and got."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from model_samples import TEXTS, generators, labelled, observation, pixels

from defi_models import GFDM, GIDM, DeFIPolicy, presets
from defi_models.errors import InputError
from defi_models.inputs.normalization import FieldStatistics, Statistics


@pytest.fixture(scope="module")
def gfdm() -> GFDM:
    return GFDM(presets.gfdm("nano", frames=4)).eval()


@pytest.fixture(scope="module")
def gidm() -> GIDM:
    return GIDM(presets.gidm("nano", encoder={"dim": 32, "blocks": 1}, decoder={"blocks": 1})).eval()


@pytest.fixture(scope="module")
def policy(gfdm: GFDM, gidm: GIDM) -> DeFIPolicy:
    """Built once: refused input leaves it as it was."""
    return DeFIPolicy.fuse(presets.policy("nano", views=2, adapter={"frame_pair": [0, 2]}), gfdm, gidm).eval()


B = 2
WORDS = 12
"""Text tokens of the nano models."""


def floats(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def latents() -> torch.Tensor:
    return floats(B, 4, 16, 8, 8)


def loss_arguments() -> dict[str, Any]:
    text = floats(B, WORDS, 32)
    given = {"latents": latents(), "text": text, "sigma_normal": floats(B), "noise": latents()}
    return given | {"keep_draw": floats(B)}


def masked(batch: int) -> dict[str, Any]:
    return labelled(batch) | {"action_mask": torch.ones(batch, 10, dtype=torch.bool)}


def batch_call(model: Any, **batch: Any) -> Any:
    return model(batch, generators(B))


CALLS: dict[str, tuple[str, Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "gfdm.forward": ("gfdm", batch_call, lambda: {"frames": pixels(B, 4), "text": TEXTS[:B]}),
    "gfdm.forward from latents": ("gfdm", batch_call, lambda: {"latents": latents(), "text": TEXTS[:B]}),
    "gfdm.loss": ("gfdm", lambda model, **given: model.loss(**given), loss_arguments),
    "gfdm.unet_output": (
        "gfdm",
        lambda model, **given: model.unet_output(**given),
        lambda: {"x": floats(B, 4, 32, 8, 8), "timestep": floats(B), "text": floats(B, WORDS, 64)},
    ),
    "gfdm.encode_frames": (
        "gfdm",
        lambda model, **given: model.encode_frames(**given),
        lambda: {"frames": pixels(B, 4)},
    ),
    "gfdm.decode_latents": (
        "gfdm",
        lambda model, **given: model.decode_latents(**given),
        lambda: {"latents": latents()},
    ),
    "gfdm.encode_text": (
        "gfdm",
        lambda model, **given: model.encode_text(**given),
        lambda: {"text": TEXTS[:B]},
    ),
    "gfdm.features": (
        "gfdm",
        lambda model, **given: model.features(**given),
        lambda: {"images": pixels(B), "text": TEXTS[:B]},
    ),
    "gfdm.features_from_latents": (
        "gfdm",
        lambda model, **given: model.features_from_latents(**given),
        lambda: {"condition": floats(B, 16, 8, 8), "text": floats(B, WORDS, 32), "noise": latents()},
    ),
    "gfdm.sample": (
        "gfdm",
        lambda model, **given: model.sample(steps=1, **given),
        lambda: {"first_frames": pixels(B), "text": TEXTS[:B]},
    ),
    "gidm.forward": ("gidm", batch_call, lambda: {"frames": pixels(B, 2), "text": TEXTS[:B]}),
    "gidm.forward from features": (
        "gidm",
        batch_call,
        lambda: {"features": floats(B, 2, 64, 36), "text": TEXTS[:B]},
    ),
    "gidm.loss": (
        "gidm",
        lambda model, **given: model.loss(**given),
        lambda: {
            "features": floats(B, 2, 64, 36),
            "text": floats(B, WORDS, 32),
            "text_mask": torch.ones(B, WORDS, dtype=torch.bool),
        },
    ),
    "gidm.encode": (
        "gidm",
        lambda model, **given: model.encode(**given),
        lambda: {"frames": pixels(B, 2), "text": TEXTS[:B]},
    ),
    "gidm.encode_frames": (
        "gidm",
        lambda model, **given: model.encode_frames(**given),
        lambda: {"frames": pixels(B, 2)},
    ),
    "gidm.encode_text": (
        "gidm",
        lambda model, **given: model.encode_text(**given),
        lambda: {"text": TEXTS[:B]},
    ),
    "policy.forward": ("policy", batch_call, lambda: masked(B)),
    "policy.act": (
        "policy",
        lambda model, **given: model.act(given, generators(B)),
        lambda: observation(B),
    ),
    "policy.gfdm_features": (
        "policy",
        lambda model, **given: model.gfdm_features(**given),
        lambda: {"images": pixels(B, 2), "text": TEXTS[:B]},
    ),
    "policy.perceive": (
        "policy",
        lambda model, **given: model.perceive(**given),
        lambda: {"images": pixels(B, 2), "text": TEXTS[:B]},
    ),
}

TENSOR_FAULTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "another dtype": lambda good: good.float() if not good.is_floating_point() else good.to(torch.int64),
    "a missing dimension": lambda good: good[0],
    "an empty batch": lambda good: good[:0],
    "numpy": lambda good: good.numpy(),
    "a list": lambda good: good.tolist(),
    "nothing": lambda good: None,
}
TEXT_FAULTS: dict[str, Callable[[list[str]], Any]] = {
    "a plain string": lambda good: good[0],
    "no string": lambda good: [],
    "numbers": lambda good: list(range(len(good))),
    "nothing": lambda good: None,
}
SIZE_FAULTS: dict[str, dict[str, int]] = {
    # key -> dimension whose size the model fixes, by name
    "gfdm.forward": {"frames.count": 1, "frames.height": 2, "frames.width": 3, "frames.colours": 4},
    "gfdm.forward from latents": {"latents.count": 1, "latents.channels": 2, "latents.height": 3},
    "gfdm.loss": {"latents.channels": 2, "text.width": 2, "noise.count": 1},
    "gfdm.unet_output": {"x.channels": 2, "x.height": 3, "text.width": 2},
    "gfdm.encode_frames": {"frames.height": 2, "frames.width": 3},
    "gfdm.decode_latents": {"latents.channels": 2, "latents.width": 4},
    "gfdm.features": {"images.height": 1, "images.width": 2},
    "gfdm.features_from_latents": {"condition.channels": 1, "text.width": 2, "noise.count": 1},
    "gfdm.sample": {"first_frames.height": 1, "first_frames.width": 2},
    "gidm.forward": {"frames.count": 1, "frames.colours": 4},
    "gidm.forward from features": {"features.count": 1, "features.width": 3},
    "gidm.loss": {"features.count": 1, "text.width": 2, "text_mask.length": 1},
    "gidm.encode": {"frames.count": 1, "frames.colours": 4},
    "gidm.encode_frames": {"frames.colours": 4},
    "policy.forward": {"images.views": 1, "actions.chunk": 1, "actions.width": 2, "action_mask.chunk": 1},
    "policy.act": {"images.views": 1, "images.height": 2, "images.width": 3, "proprio.width": 1},
    "policy.gfdm_features": {"images.views": 1, "images.height": 2},
    "policy.perceive": {"images.views": 1, "images.height": 2},
}


def faults() -> list[Any]:
    """(call, key, what is wrong with it, corruption) of every combination that is a fault."""
    found = []
    for call, (_, _, good) in CALLS.items():
        for number, (key, value) in enumerate(good().items()):
            wrong: dict[str, Callable[[Any], Any]] = dict(
                TEXT_FAULTS if isinstance(value, list) else TENSOR_FAULTS
            )
            if (call, key) in {
                ("gfdm.loss", "keep_draw"),
                ("gidm.loss", "text_mask"),
                ("policy.forward", "action_mask"),
            }:
                del wrong["nothing"]  # optional
            if number:  # the first key says how many samples there are
                wrong["another batch size"] = lambda good: (
                    good + good[:1] if isinstance(good, list) else torch.cat([good, good[:1]])
                )
            found += [pytest.param(call, key, f, id=f"{call}, {key}: {name}") for name, f in wrong.items()]
        for name, dimension in SIZE_FAULTS.get(call, {}).items():
            key, what = name.split(".")
            found.append(
                pytest.param(
                    call,
                    key,
                    lambda good, d=dimension: torch.cat([good, good.narrow(d, 0, 1)], dim=d),
                    id=f"{call}, {key}: one more {what}",
                )
            )
    return found


def got(value: Any) -> str:
    """The part of a message that says what was given."""
    if isinstance(value, torch.Tensor):
        return f"got {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, str):
        return f"got the str '{value[:20]}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return f"got {len(value)} string(s)"
    if isinstance(value, list) and isinstance(value[0], int):
        return "got int"
    return f"got {type(value).__name__}"


@pytest.mark.parametrize(("call", "key", "corrupt"), faults())
def test_bad_input_is_named_with_what_was_expected_and_what_was_got(
    call: str, key: str, corrupt: Callable[[Any], Any], request: pytest.FixtureRequest
) -> None:
    fixture, run, good = CALLS[call]
    given = good()
    bad = corrupt(given[key])
    with pytest.raises(InputError) as caught:
        run(request.getfixturevalue(fixture), **given | {key: bad})
    message = str(caught.value)
    assert re.match(rf"{key}(\[0\])?: ", message), message
    assert got(bad) in message and "expected " in message, message


@pytest.mark.parametrize("call", CALLS)
def test_good_input_passes_every_check(call: str, request: pytest.FixtureRequest) -> None:
    fixture, run, good = CALLS[call]
    run(request.getfixturevalue(fixture), **good())


@pytest.mark.parametrize(
    ("call", "key"),
    [
        ("gfdm.forward", "frames"),
        ("gfdm.forward", "text"),
        ("gidm.forward", "frames"),
        ("gidm.forward", "text"),
        *(("policy.forward", key) for key in ("images", "text", "actions", "proprio")),
        *(("policy.act", key) for key in ("images", "text", "proprio")),
    ],
)
def test_a_batch_without_a_key_lists_those_it_has(
    call: str, key: str, request: pytest.FixtureRequest
) -> None:
    fixture, run, good = CALLS[call]
    given = good()
    del given[key]
    with pytest.raises(InputError, match=rf"^{key}: got no such key, only {', '.join(given)}; expected "):
        run(request.getfixturevalue(fixture), **given)


@pytest.mark.parametrize("name", ["gfdm", "gidm", "policy"])
def test_a_batch_that_is_no_mapping_is_refused(name: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(InputError, match=r"^batch: got uint8 \(2, 2, 64, 64, 3\); expected a mapping with '"):
        request.getfixturevalue(name)(pixels(2, 2))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_state_that_is_not_finite_is_refused_and_counted(policy, wrong: float) -> None:
    batch = observation(2)
    batch["proprio"][1, 2] = wrong
    with pytest.raises(
        InputError, match=r"^proprio: got 1 NaN or infinite of 8 values; expected finite float32 \(2, 4\)"
    ):
        policy.act(batch)


def test_statistics_that_are_not_finite_are_refused(policy) -> None:
    field = FieldStatistics(mean=[0.0] * 4, std=[1.0] * 4, min=[-1.0] * 4, max=[1.0, 1.0, 1.0, float("nan")])
    with pytest.raises(InputError, match="statistics: got 2 NaN or infinite"):
        policy.set_statistics(Statistics(action=field, proprio=field))


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_sampling_takes_a_whole_number_of_steps(gfdm, steps) -> None:
    with pytest.raises(InputError, match=rf"^steps: got {steps}; expected a whole number of at least 1"):
        gfdm.sample(pixels(1), TEXTS[:1], steps=steps)


@pytest.mark.parametrize("guidance", [None, "2", float("nan"), True])
def test_guidance_is_a_finite_number(gfdm, guidance) -> None:
    with pytest.raises(InputError, match=rf"^guidance: got {guidance!r}; expected a finite number"):
        gfdm.sample(pixels(1), TEXTS[:1], steps=1, guidance=guidance)


def test_numbers_of_numpy_are_numbers(gfdm) -> None:
    sampled = gfdm.sample(pixels(1), TEXTS[:1], steps=np.int64(1), guidance=np.float32(1))
    assert sampled.shape == (1, 4, 64, 64, 3)


@pytest.mark.parametrize("generator", ["seed", [torch.Generator()]])
def test_gidm_refuses_generators_of_another_number_or_type(gidm, generator) -> None:
    frames = torch.zeros(B, 2, 64, 64, 3, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"^generator: got "):
        gidm({"frames": frames, "text": TEXTS[:B]}, generator)


def test_pictures_smaller_than_a_patch_are_refused(gidm) -> None:
    with pytest.raises(InputError, match=r"frames: got uint8 \(1, 2, 4, 64, 3\); expected .*H >= 8"):
        gidm.encode(torch.zeros(1, 2, 4, 64, 3, dtype=torch.uint8), TEXTS[:1])


def test_a_plain_string_as_text_is_answered_with_the_list_to_write(policy) -> None:
    batch = observation(1) | {"text": "open the drawer"}
    with pytest.raises(InputError, match=r"Write \['open the drawer'\] for one sample"):
        policy.act(batch)


def test_encoders_themselves_refuse_a_plain_string(gidm) -> None:
    with pytest.raises(InputError, match=r"^texts: got the str 'open'"):
        gidm.text_encoder.states("open")


def test_one_generator_per_sample_is_asked_for_by_numbers(policy) -> None:
    with pytest.raises(
        InputError, match="generator: got 3 generators; expected one per sample of a batch of 2"
    ):
        policy.act(observation(2), generators(3))
