"""The OpenAPI description of `POST /v1/act`, made from the policy that is served."""

from __future__ import annotations

from typing import Any

from defi_platform.serve.observation import PolicySpec
from defi_platform.serve.observation_keys import ObservationKeys

_NUMBER = {"type": "number"}
_TIMING = {
    "type": "object",
    "description": "Milliseconds of its parts, and the observations that were answered by one forward pass.",
    "properties": {
        "queue_ms": _NUMBER,
        "infer_ms": _NUMBER,
        "total_ms": _NUMBER,
        "batch_size": {"type": "integer"},
    },
}


def act_operation(spec: PolicySpec, keys: ObservationKeys) -> dict[str, Any]:
    """Arguments of FastAPI's `post` that describe the operation.

    Args:
        spec: of the policy.
        keys: where an observation's parts are.
    """
    one = observation_schema(spec, keys)
    batch = {
        "type": "object",
        "required": ["batch"],
        "properties": {"batch": {"type": "array", "items": one}},
    }
    body = {"schema": {"oneOf": [one, batch]}}
    return {
        "summary": "Actions for an observation",
        "openapi_extra": {
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {**body, "example": _example(spec, keys)},
                    "application/msgpack": {
                        "schema": {
                            "type": "string",
                            "format": "binary",
                            "description": "The same map as openpi-client's msgpack_numpy packs it; images may be "
                            "uint8 arrays (height, width, 3), or PNG or JPEG files as bytes.",
                        }
                    },
                },
            }
        },
        "responses": {
            200: {"description": "Actions", "content": {"application/json": {"schema": answer_schema(spec)}}},
            **{
                code: {"description": text, "content": {"application/json": {"schema": _ERROR}}}
                for code, text in _REFUSALS.items()
            },
        },
    }


def observation_schema(spec: PolicySpec, keys: ObservationKeys) -> dict[str, Any]:
    """JSON schema of an observation.

    Args:
        spec: of the policy.
        keys: where an observation's parts are.
    """
    described = keys.described(spec.cameras)
    image = {
        "type": "string",
        "description": "A PNG or JPEG file in base64, or as a data URL; of any size up to 4096x4096.",
    }
    properties: dict[str, Any] = dict.fromkeys(described["images"].values(), image)
    if spec.state_dim:
        what = f"The raw state; {spec.state_dim} numbers in all."
        properties |= {
            key: {"type": "array", "items": _NUMBER, "description": what} for key in described["state"]
        }
    required = list(properties)
    properties[keys.prompt] = {"type": "string", "maxLength": 2000, "description": "What to do."}
    properties |= {
        "seed": {
            "type": "integer",
            "minimum": 0,
            "description": "Of the noise: the same observation and seed give the same actions.",
        },
        "slack_ms": {**_NUMBER, "description": "How long the answer may be delayed to share a forward pass."},
        "deadline_ms": {
            **_NUMBER,
            "description": "How long an answer is of any use; refused with 504 after it.",
        },
    }
    return {"type": "object", "required": [*required, keys.prompt], "properties": properties}


def answer_schema(spec: PolicySpec) -> dict[str, Any]:
    """JSON schema of an answer.

    Args:
        spec: of the policy.
    """
    return {
        "type": "object",
        "properties": {
            "actions": {
                "type": "array",
                "description": f"{spec.chunk} actions of {spec.action_dim} numbers in raw units.",
                "items": {"type": "array", "items": _NUMBER},
            },
            "seed": {"type": "integer"},
            "policy_digest": {"type": "string", "description": "Names the weights that made the actions."},
            "server_timing": _TIMING,
            "ignored": {
                "type": "array",
                "items": {"type": "string"},
                "description": "Keys that were not read.",
            },
        },
    }


_ERROR = {
    "type": "object",
    "properties": {
        "error": {"type": "string", "description": "What is wrong, and what is expected."},
        "reason": {"type": "string"},
    },
}
_REFUSALS = {
    400: "The body is not in its format.",
    401: "A token is needed (Authorization: Bearer TOKEN).",
    413: "The body is over the limit.",
    422: "The observation does not fit the policy.",
    429: "Over the rate of this token.",
    500: "The policy failed, or gave actions that no robot should carry out.",
    503: "Busy; Retry-After says when to come back.",
    504: "No answer within deadline_ms.",
}


def _example(spec: PolicySpec, keys: ObservationKeys) -> dict[str, Any]:
    described = keys.described(spec.cameras)
    example: dict[str, Any] = dict.fromkeys(described["images"].values(), "<base64 of a PNG or JPEG file>")
    if spec.state_dim and len(described["state"]) == 1:
        example[described["state"][0]] = [0.0] * spec.state_dim
    return example | {keys.prompt: "open the drawer", "seed": 7}
