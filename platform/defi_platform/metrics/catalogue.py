"""Every metric of the platform: the processes emit them, the dashboard and the docs are made from them."""

from __future__ import annotations

from defi_platform.metrics.metric import Counter, Gauge, Histogram, Metric

PARTS = {
    "ingest": "Ingest",
    "encode": "Encoding",
    "storage": "Storage",
    "data": "Samples",
    "train": "Training",
    "serve": "Serving",
    "evaluate": "Evaluation",
}
"""Second word of a metric's name -> title of its row in the dashboard."""

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_LONG_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0)

# --------------------------------------------------------------------------- ingest, encoding, storage

INGEST_LISTED = Counter(
    name="defi_ingest_listed_videos_total",
    help="Videos that a corpus has listed.",
    unit="videos",
    labels=("corpus",),
    panel="Listed and opened",
)
INGEST_OPENED = Counter(
    name="defi_ingest_opened_files_total",
    help="Files that were opened once to look into them.",
    unit="files",
    labels=("corpus",),
    panel="Listed and opened",
)
INGEST_VIDEOS = Counter(
    name="defi_ingest_videos_total",
    help="Videos of ingested corpora by result: usable, or the reason of the rejection.",
    unit="videos",
    labels=("corpus", "result"),
    panel="Videos by result",
)
ENCODE_VIDEOS = Counter(
    name="defi_encode_videos_total",
    help="Videos brought into a latent cache by result: encoded, or the reason of the rejection.",
    unit="videos",
    labels=("kind", "result"),
    panel="Videos encoded",
)
ENCODE_FRAMES = Counter(
    name="defi_encode_frames_total",
    help="Frames written to a latent cache.",
    unit="frames",
    labels=("kind",),
    panel="Frames encoded",
)
STORAGE_RETRIES = Counter(
    name="defi_storage_retries_total",
    help="Failed requests to a store or disk that were made again.",
    unit="retries",
    labels=("user",),
    panel="Requests made again",
)

# --------------------------------------------------------------------------- samples on their way to training

DATA_SAMPLES = Counter(
    name="defi_data_samples_total",
    help="Samples handed to training, by corpus.",
    unit="samples",
    labels=("run", "corpus"),
    panel="Samples by corpus",
)
DATA_CACHED_SAMPLES = Counter(
    name="defi_data_cached_samples_total",
    help="Samples that came from the latent cache instead of a decoder.",
    unit="samples",
    labels=("run",),
    panel="Samples from the latent cache",
)
DATA_SKIPPED_VIDEOS = Counter(
    name="defi_data_skipped_videos_total",
    help="Bad videos that others stood in for, by reason.",
    unit="videos",
    labels=("run", "corpus", "reason"),
    panel="Bad videos replaced",
)
DATA_BATCH_SECONDS = Histogram(
    name="defi_data_batch_seconds",
    help="Time that a decode actor takes for a micro-batch.",
    unit="seconds",
    labels=("run",),
    buckets=_LONG_SECONDS,
    panel="Time of a micro-batch in a decode actor",
)
DATA_STORE_WAIT = Counter(
    name="defi_data_store_wait_seconds_total",
    help="Time that decode actors have waited for a store that does not answer.",
    unit="seconds",
    labels=("run",),
    panel="Waiting for the store",
)

# --------------------------------------------------------------------------- training

_RUN = ("run", "kind")

TRAIN_STEP = Gauge(
    name="defi_train_step",
    help="Updates of the weights so far.",
    unit="step",
    labels=_RUN,
    panel="Step and last checkpoint",
)
TRAIN_CHECKPOINT_STEP = Gauge(
    name="defi_train_checkpoint_step",
    help="Step of the newest checkpoint in the run folder: what a lost node costs is the difference to the step.",
    unit="step",
    labels=_RUN,
    panel="Step and last checkpoint",
)
TRAIN_PROGRESS = Gauge(
    name="defi_train_progress_ratio",
    help="Steps done of all that the run is to make.",
    unit="ratio",
    labels=_RUN,
    panel="Progress",
)
TRAIN_SAMPLES = Counter(
    name="defi_train_samples_total",
    help="Samples that the weights were updated with, those repeated after a failure included.",
    unit="samples",
    labels=_RUN,
    panel="Samples trained on",
)
TRAIN_PHASE_SECONDS = Counter(
    name="defi_train_phase_seconds_total",
    help="Time of rank 0 by phase: data, forward, backward, optimizer, checkpoint, validation, other.",
    unit="seconds",
    labels=(*_RUN, "phase"),
    panel="Time by phase",
)
TRAIN_LOSS = Gauge(
    name="defi_train_loss",
    help="Loss of the last logged update (split train) or validation.",
    unit="loss",
    labels=(*_RUN, "split"),
    panel="Loss",
)
TRAIN_EVENTS = Counter(
    name="defi_train_events_total",
    help="What happened to a run: attempt, skipped, diverged, checkpoint_left_out, preemption.",
    unit="events",
    labels=(*_RUN, "event"),
    panel="Events",
)
TRAIN_WORKERS = Gauge(
    name="defi_train_workers",
    help="Ranks of the running attempt.",
    unit="workers",
    labels=_RUN,
    panel="Workers",
)
TRAIN_GPU_BYTES = Gauge(
    name="defi_train_gpu_peak_bytes",
    help="Most memory of its GPU that rank 0 has used.",
    unit="bytes",
    labels=_RUN,
    panel="GPU memory of rank 0",
)
TRAIN_MFU = Gauge(
    name="defi_train_mfu_ratio",
    help="Floating-point work of the model over what the GPU could have done in the time.",
    unit="ratio",
    labels=_RUN,
    panel="Model FLOPs utilisation",
)

# --------------------------------------------------------------------------- serving

_POLICY = ("policy_digest",)

SERVE_LATENCY = Histogram(
    name="defi_serve_latency_seconds",
    help="Time of an observation by phase: decode, queue, infer, total.",
    unit="seconds",
    labels=(*_POLICY, "phase"),
    buckets=_SECONDS,
    panel="Latency",
)
SERVE_BATCH = Histogram(
    name="defi_serve_batch_observations",
    help="Observations in the forward pass of an answer.",
    unit="observations",
    labels=_POLICY,
    buckets=(1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0),
    panel="Observations per forward pass",
)
SERVE_ANSWERS = Counter(
    name="defi_serve_answers_total",
    help="Observations answered with actions.",
    unit="answers",
    labels=_POLICY,
    panel="Answers",
)
SERVE_REFUSALS = Counter(
    name="defi_serve_refusals_total",
    help="Observations refused in words, by reason.",
    unit="refusals",
    labels=(*_POLICY, "reason"),
    panel="Refusals",
)
SERVE_SOCKET_EVENTS = Counter(
    name="defi_serve_socket_events_total",
    help="Sockets opened, moved, refused or closed, by event.",
    unit="events",
    labels=(*_POLICY, "event"),
    panel="Socket events",
)
SERVE_QUEUED = Gauge(
    name="defi_serve_queued_observations",
    help="Observations that wait for a forward pass.",
    unit="observations",
    labels=_POLICY,
    over="sum",
    panel="Observations in flight",
)
SERVE_IN_FLIGHT = Gauge(
    name="defi_serve_in_flight_observations",
    help="Observations that have come and are not answered.",
    unit="observations",
    labels=_POLICY,
    over="sum",
    panel="Observations in flight",
)
SERVE_OLDEST_WAIT = Gauge(
    name="defi_serve_oldest_wait_seconds",
    help="Time that the oldest queued observation has waited.",
    unit="seconds",
    labels=_POLICY,
    panel="Oldest wait",
)
SERVE_SOCKETS = Gauge(
    name="defi_serve_open_sockets",
    help="Open websockets of clients.",
    unit="sockets",
    labels=_POLICY,
    over="sum",
    panel="Open sockets",
)
SERVE_GPU_BYTES = Gauge(
    name="defi_serve_gpu_memory_bytes",
    help="Memory of the GPU that PyTorch holds for a replica.",
    unit="bytes",
    labels=_POLICY,
    panel="GPU memory of a replica",
)

# --------------------------------------------------------------------------- evaluation

EVALUATE_EPISODES = Counter(
    name="defi_evaluate_episodes_total",
    help="Finished episodes by policy under test and outcome: success or failure.",
    unit="episodes",
    labels=("run", "arm", "outcome"),
    panel="Episodes",
)
EVALUATE_STEPS = Counter(
    name="defi_evaluate_steps_total",
    help="Simulator steps of finished episodes.",
    unit="steps",
    labels=("run", "arm"),
    panel="Simulator steps",
)
EVALUATE_EPISODE_SECONDS = Histogram(
    name="defi_evaluate_episode_seconds",
    help="Time of an episode.",
    unit="seconds",
    labels=("run", "arm"),
    buckets=_LONG_SECONDS,
    panel="Time of an episode",
)
EVALUATE_REQUEST_SECONDS = Histogram(
    name="defi_evaluate_request_seconds",
    help="Time of a simulator's request to the policy, as the simulator sees it.",
    unit="seconds",
    labels=("run",),
    buckets=_SECONDS,
    panel="Time of a request to the policy",
)
EVALUATE_REPEATED = Counter(
    name="defi_evaluate_repeated_episodes_total",
    help="Episodes begun again because their simulator died.",
    unit="episodes",
    panel="Episodes begun again",
)
EVALUATE_SIMULATOR_ERRORS = Counter(
    name="defi_evaluate_simulator_errors_total",
    help="Tries of episodes that the simulator did not survive, by kind: hang, abort, memory, render, protocol, error, worker.",
    unit="errors",
    labels=("run", "kind"),
    panel="Simulator errors",
)
EVALUATE_RECORDED = Counter(
    name="defi_evaluate_recorded_episodes_total",
    help="Demonstrations recorded by outcome: kept or failed.",
    unit="episodes",
    labels=("run", "outcome"),
    panel="Demonstrations recorded",
)

CATALOGUE: tuple[Metric, ...] = tuple(
    value for value in list(globals().values()) if isinstance(value, Metric)
)
"""All of them, in the order of this file."""
