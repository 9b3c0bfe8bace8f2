"""The connection of an evaluation to a served policy: that of `defi_client`, with the platform's errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from defi_client import connection
from defi_client.errors import AddressError, ClientError, LostError, UnreachableError
from defi_platform.errors import ConfigError, ServeError


def read_token(path: str | None) -> str | None:
    """The token in a file; None without a file.

    Raises:
        ConfigError: the file is absent or holds something else than one token.
    """
    if path is None:
        return None
    try:
        words = Path(path).read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"token_file {path}: {getattr(error, 'strerror', None) or error}.") from error
    if len(words) != 1:
        raise ConfigError(f"token_file {path} holds {len(words)} words; write the token and nothing else.")
    return words[0]


class PolicyClient(connection.Connection):
    """One connection to a policy server, which is had again when it is lost; a context manager."""

    def __init__(self, url: str, reconnect_s: float = connection.RECONNECT_S, token: str | None = None):
        """Connects and reads the greeting.

        Args:
            url: ws://host:port, or wss:// for TLS.
            reconnect_s: seconds of reconnection attempts after a connection is lost.
            token: that the server asks for (`security.tokens`).

        Raises:
            ConfigError: the url is malformed, or the server asks for another token.
            ServeError: nobody answers there.
        """
        with _platform_errors():
            super().__init__(url, token=token, reconnect_s=reconnect_s)

    def begin_episode(self, task: str) -> None:
        """Begins an episode or a subtask of one; to a server of openpi's protocol each observation stands alone.

        Args:
            task: name.
        """

    def infer(
        self, observation: dict[str, Any], reconnect_s: float | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Asks for the actions of one observation.

        Args:
            observation: as `serve.observation.read_observation` takes it.
            reconnect_s: seconds of attempts after a loss; None: those of the connection.

        Returns:
            The actions, (chunk, A) in raw units, and the whole answer.

        Raises:
            ServeError: the server rejects the observation, gives no usable actions or stays unreachable.
        """
        with _platform_errors():
            return super().infer(observation, reconnect_s)


@contextlib.contextmanager
def _platform_errors() -> Iterator[None]:
    """Turns the client's errors into those of the platform, with what is to be done about them here."""
    try:
        yield
    except AddressError as error:
        fix = " Write it into a file and set token_file." if "asks for a token" in str(error) else ""
        raise ConfigError(f"{error}{fix}") from error
    except UnreachableError as error:
        raise ServeError(
            f"{error} Start one with `python jobs/serve_policy.py policy=FOLDER`, or leave out url to have it started."
        ) from error
    except LostError as error:
        raise ServeError(
            f"{error} Start it again, then run the same command: finished episodes are kept."
        ) from error
    except ClientError as error:
        raise ServeError(str(error)) from error


def check_same_policy(expected: str | None, digest: str | None, url: str) -> None:
    """Checks that an evaluation is of one policy: a server may get another one while it runs.

    Args:
        expected: `policy_digest` of the policy that is evaluated; None where its server names none.
        digest: of an answer, or of an episode that is there already.
        url: of the server, for the message.

    Raises:
        ServeError: they are two policies.
    """
    if expected is not None and digest is not None and digest != expected:
        raise ServeError(
            f"the policy server at {url} has two policies: {digest} answered where {expected} is evaluated. Serve the "
            "policy of the finished episodes again, or evaluate the other one with another output."
        )


def check_same_inference(
    expected: Mapping[str, Any] | None, inference: Mapping[str, Any] | None, url: str
) -> None:
    """Checks that a policy is computed in one way: its server may have been started again with another precision.

    Args:
        expected: `inference` of the greeting that the evaluation began with; None where it named none.
        inference: of the present connection's greeting.
        url: of the server, for the message.

    Raises:
        ServeError: they are two ways.
    """
    if expected and inference and dict(expected) != dict(inference):
        raise ServeError(
            f"the policy server at {url} computes with {inference}, and finished episodes are of {expected}. Serve it as "
            "before (model), or evaluate with another output."
        )


def check_metadata(
    metadata: dict[str, Any],
    *,
    source: str,
    benchmark: str,
    cameras: Sequence[str],
    state_dim: int,
    action_dim: int,
    execute_steps: int | None,
) -> None:
    """Checks that a policy can drive a benchmark.

    Args:
        metadata: the server's greeting.
        source: url or folder of the policy, for the message.
        benchmark: its name, for the message.
        cameras: whose images the policy will get, by the names it is sent.
        state_dim: of the benchmark's state.
        action_dim: of the benchmark's actions.
        execute_steps: actions executed of each chunk; None for all.

    Raises:
        ConfigError: it cannot; names everything that does not fit.
    """
    wrong = []
    if metadata.get("action_dim", action_dim) != action_dim:
        wrong.append(f"it gives {metadata['action_dim']} action dims, {benchmark} takes {action_dim}")
    if metadata.get("state_dim", state_dim) not in (0, state_dim):
        wrong.append(f"it takes {metadata['state_dim']} state dims, {benchmark} gives {state_dim}")
    wanted = list(map(str, metadata.get("cameras", cameras)))
    if sorted(wanted) != sorted(cameras) and not (wanted == ["*"] and len(cameras) == 1):
        shown = ", ".join(f"'{camera}'" for camera in cameras)
        wrong.append(f"it looks through {', '.join(wanted)}, the evaluation through {shown}")
    chunk = metadata.get("chunk")
    if execute_steps is not None and chunk is not None and execute_steps > chunk:
        wrong.append(f"it gives chunks of {chunk} actions, execute_steps is {execute_steps}")
    if wrong:
        raise ConfigError(
            f"the policy at {source} (preset {metadata.get('preset', 'unknown')}) does not fit: "
            f"{'; '.join(wrong)}. Serve a policy fine-tuned for this benchmark, or set cameras, "
            "policy_cameras and execute_steps to what it has."
        )
