"""Serving of a policy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from defi_platform.config.cluster import RayConfig
from defi_platform.config.fields import PATH
from defi_platform.config.train import ServedActingConfig
from defi_platform.errors import ConfigError


@dataclass
class ScalingConfig:
    """Scaling: times and loads at which replicas are added and taken away, where `replicas` leaves room."""

    target_in_flight: float | None = None
    """Observations in flight per replica that are aimed at; null: as many as a replica carries while none waits longer
    than max_wait_ms for the device or for the others of its pass, and max_batch_size at most."""
    max_wait_ms: float = 100.0
    """Milliseconds that an observation may wait beyond the forward pass that runs when it comes; another replica is added
    where it is longer."""
    upscale_delay_s: float = 2.0
    """Seconds of too much load before a replica is added."""
    downscale_delay_s: float = 60.0
    """Seconds of too little load before one is taken away; its websockets move to the others."""


@dataclass
class RedeployConfig:
    """End of running episodes when the same command serves another policy in the place of this one."""

    at_once: bool = False
    """True: each websocket goes on with the new policy after its next answer; false: after its episode."""
    finish_episodes_s: float = 300.0
    """Seconds that running episodes get to end on the old policy."""


@dataclass
class LimitsConfig:
    """Limits of one replica that keep one client from harming the others."""

    max_message_mib: int = 16
    """MiB of one message; a longer one closes its socket with code 1009."""
    memory_mib: int = 1024
    """MiB of received messages that are incomplete or not answered yet, of all sockets together. Past it the message
    that has been arriving for longest is given up and its socket closed with code 1013."""
    handshake_timeout_s: float = 10.0
    """Seconds from a connection to its first complete request."""
    message_timeout_s: float = 30.0
    """Seconds from the first to the last byte of a message or HTTP request."""
    write_timeout_s: float = 30.0
    """Seconds that a client may leave an answer unread."""
    idle_timeout_s: float = 3600.0
    """Seconds without a message after which a websocket is closed; our clients connect again by themselves."""
    stalled_after_s: float = 20.0
    """Seconds that a replica's process or the loop of its sockets may stand still; then it is ended, its clients connect
    again, and Serve starts another. At least 5."""
    queue_size: int = 256
    """Observations of a replica that wait for a forward pass; the next one is refused as busy, retry after."""
    queue_wait_s: float = 30.0
    """Seconds that an observation may have to wait for its forward pass, by prediction; beyond it is refused as busy."""
    action_margin: float | None = 1.0
    """How far an action may lie outside its range in the training data, in widths of that range; beyond it the client
    gets an error and no action. null: anywhere. NaN and infinity never leave the server."""


@dataclass
class InferenceConfig:
    """Computation of the policy: precision, compilation, determinism, cached prompts."""

    dtype: str = "float32"
    """float32 | bfloat16, of weights and activations; noise, normalisation and actions stay float32."""
    compile: str = "none"
    """none | graphs | default | reduce-overhead | max-autotune. graphs: on a GPU, each pass is replayed as one CUDA graph.
    The others are modes of torch.compile; the last two replay such graphs too. Batches are padded to powers of two, and
    compilation takes minutes at the start, since each size is compiled before clients come."""
    package: str | None = field(default=None, metadata=PATH)
    """File of jobs/export_model.py `package.path`, of this policy: its compiled code computes every pass, of the batch size
    that it was made for, and nothing is compiled at the start. In the place of compile."""
    deterministic: bool = False
    """Bit for bit the same action for the same observation and seed, whatever else is in the batch: every forward pass
    has one shape, of one observation on a CPU and of max_batch_size (padded) on a GPU."""
    prompt_cache: int = 512
    """Prompts whose text features are kept, the most recently used ones."""


@dataclass
class SecurityConfig:
    """Access to a served policy: tokens, TLS and rate."""

    tokens: str | None = field(default=None, metadata=PATH)
    """File with one client a line, as `name: token` or `name: SHA-256 of the token`; read again when it changes.
    Clients send `Authorization: Api-Key TOKEN` or `Authorization: Bearer TOKEN`. null: everybody may come in."""
    tls_cert: str | None = field(default=None, metadata=PATH)
    """Certificate chain (PEM) for wss:// and https://; null: no encryption."""
    tls_key: str | None = field(default=None, metadata=PATH)
    """Private key (PEM) of tls_cert."""
    rate: float | None = None
    """Messages per second and replica that one token (without tokens, one address) may send; null: no limit."""


@dataclass
class SessionConfig:
    """Answers of websocket sessions; a client changes them for itself in its address: ws://HOST:PORT/?answers=step."""

    answers: str | None = None
    """chunk: a whole chunk with each answer. step: one action with each answer, and the policy runs when open_loop
    actions of its chunk are used up. null: what clients of the protocol expect (vla-eval step, the others chunk)."""
    open_loop: int | None = None
    """Actions of a chunk before the policy runs again, step by step; null: execute_steps of the policy's contract; 1
    where ensemble would have nothing to average with it."""
    ensemble: float | None = None
    """Temporal ensembling, step by step: an action is the mean over all chunks that speak of its step, with weights
    exp(-ensemble * i) from the oldest (i = 0); does nothing with an open_loop of a whole chunk. null: the newest alone."""
    seed: int | None = None
    """From which seeds are drawn for observations without one, by episode and number; null: at random."""
    expiry_s: float = 60.0
    """Seconds without a message after which the rest of a chunk is too old to be carried out."""


@dataclass
class ObservationKeysConfig:
    """Names of an observation's parts in clients' messages."""

    names: str | None = None
    """defi, calvin, metaworld, libero, simpler_env, lerobot, droid, vla_eval or xpolicylab; null: the protocol's own."""
    images: str | None = None
    """Key of images, with {camera} for the name of a camera; slashes also lead into maps within maps. null: as names."""
    cameras: dict[str, str] = field(default_factory=dict)
    """Keys of single cameras of the policy; "*" is the one camera of a policy that does not name it."""
    state: list[str] = field(default_factory=list)
    """Keys whose numbers, one after another, are the state; empty: as names."""
    prompt: str | None = None
    """Key of the instruction; null: as names."""
    actions: dict[str, int] = field(default_factory=dict)
    """Parts of an action and their sizes, in order, for XPolicyLab: {arm_joint_state: 6, ee_joint_state: 1}."""


@dataclass
class ServeConfig:
    """Serving of a policy over websockets (jobs/serve_policy.py)."""

    ray: RayConfig = field(default_factory=RayConfig)
    policy: str = field(default=MISSING, metadata=PATH)
    """Policy folder; serving needs nothing else."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all interfaces."""
    port: int = 8000
    """TCP port; 0 picks a free one."""
    replicas: Any = 1
    """Copies of the policy that answer in parallel: a number, or {min: 1, max: 4} to scale with the load."""
    replica_cpus: float = 1.0
    """Logical CPUs per replica."""
    replica_gpus: float = 0.0
    """GPUs per replica; may be a fraction."""
    max_batch_size: int = 64
    """Observations of different clients in one forward pass, at most; fewer where larger batches are not faster."""
    max_connections: int = 1000
    """Open websockets per replica, at most."""
    threads: int | None = None
    """Torch threads per replica; null: torch's default."""
    model: InferenceConfig = field(default_factory=InferenceConfig)
    acting: ServedActingConfig = field(default_factory=ServedActingConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    security: SecurityConfig = field(default_factory=SecurityConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    observation_keys: ObservationKeysConfig = field(default_factory=ObservationKeysConfig)
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    redeploy: RedeployConfig = field(default_factory=RedeployConfig)


def replica_range(replicas: Any) -> tuple[int, int]:
    """The fewest and the most replicas that `ServeConfig.replicas` asks for.

    Raises:
        ConfigError: it is neither a number from 1 on nor a mapping of min and max.
    """
    low, high = replicas, replicas
    if isinstance(replicas, dict) and replicas.keys() <= {"min", "max"} and "max" in replicas:
        low, high = replicas.get("min", 1), replicas["max"]
    # `serve run` hands its arguments over as texts.
    low, high = (int(n) if isinstance(n, str) and n.isdecimal() else n for n in (low, high))
    if type(low) is not int or type(high) is not int or not 1 <= low <= high:
        raise ConfigError(
            f"replicas is {replicas!r}; write a number from 1 on, or a range such as {{min: 1, max: 4}} "
            "(on the command line replicas.min=1 replicas.max=4)."
        )
    return low, high
