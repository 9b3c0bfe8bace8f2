"""What every test may use: one real Ray per session, and the real data beside the checkout."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch or Ray are imported, so that their worker processes inherit it.
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MUJOCO_GL", "egl")
# Threads that spin while they wait for one that has no core make a busy machine a hundred times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Beside other test processes a new Ray may need more than the minute that it gives itself.
os.environ.setdefault("RAY_gcs_server_request_timeout_seconds", "180")
# Workers that Ray starts before anything asks for them, many of which nothing ever does.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Nobody looks at the figures of processes that each node's agent collects, every five seconds by itself.
os.environ.setdefault("REPORTER_UPDATE_INTERVAL_MS", "600000")

import hypothesis
import pytest

# Examples are the same each time, and as slow as the machine.
hypothesis.settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("suite")

# Where the suite itself runs in the background of a shell, Ctrl-C is ignored by it and by every job it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]

LONGEST = (
    "train/test_failures.py",
    "train/test_recipes.py",
    "test_demo.py",
    "train/test_interruption.py",
    "cluster/test_readme_commands.py",
    "train/test_run.py",
    "train/test_async_validation.py",
    "data/test_ingest_job.py",
    "evaluate/test_recording.py",
    "cluster/test_readme_jobs.py",
    "data/test_storage.py",
    "test_quickstart.py",
    "train/test_encode_latents.py",
    "data/test_stream.py",
    "train/test_dataset_configs.py",
    "data/test_exact_frames.py",
    "train/test_outage.py",
    "models/test_compile.py",
    "evaluate/test_rollouts.py",
    "train/test_dry_run.py",
    "models/test_describe.py",
    "evaluate/test_served_policy.py",
    "serve/test_server.py",
    "serve/test_commands.py",
)
"""Files of half a minute and more: the first to begin, so that test processes end at about the same time."""
SHARED = REPOSITORY.parent / "shared"
OF_THE_PROCESS_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR")
"""Variables of the fixture `process_group`, which lasts for the whole session."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {REPOSITORY / "tests" / file: rank for rank, file in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real videos and robot data; see ../shared/data/README.md."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data in ../shared/data, which is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def shared_parity() -> Path:
    """Recorded tensors of the reference implementation; see ../shared/parity/README.md."""
    folder = SHARED / "parity"
    if not folder.is_dir():
        pytest.skip("needs the recorded tensors in ../shared/parity, which are not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A real Ray of four logical CPUs, started once for the whole session."""
    import ray
    from ray.cluster_utils import Cluster

    # By ray.init it would take the one fixed port of Ray's job agent, and each Ray that a test starts beside it would
    # wait four seconds for that port before it goes on without.
    node = {"num_cpus": 4, "object_store_memory": 1 << 30, "dashboard_agent_listen_port": 0}
    # What workers print is not shown, so nobody has to look through their files for it either.
    without = {"include_dashboard": False, "include_log_monitor": False}
    with pytest.MonkeyPatch.context() as patch:
        # A process for each group of workers, which the controllers would have here as on every cluster.
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        cluster = Cluster(initialize_head=True, head_node_args={**node, **without})
    ray.init(address=cluster.address, log_to_driver=False)
    yield
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(autouse=True)
def settings_of_ray() -> Iterator[None]:
    """Fails a test that leaves variables of Ray behind: jobs that later tests start would not fit their cluster."""

    def found() -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name.startswith("RAY_")}

    before = found()
    yield
    assert found() == before


@pytest.fixture(autouse=True, scope="module")
def other_variables() -> Iterator[None]:
    """What the tests of a file leave in the environment reaches no job that those of the next one start.

    Trainings, simulators and libraries set variables for their own processes: numbers of threads, the socket of W&B's
    service, where OpenCV's libraries are.
    """
    before = dict(os.environ)
    yield
    kept = {"PYTEST_CURRENT_TEST", *OF_THE_PROCESS_GROUP}
    for name in {*os.environ, *before} - kept:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture
def recorded_metrics(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], float]:
    """The values that the test emits, by (name of the metric, values of its labels), in place of a cluster.

    Counts add up, and so do the values of a histogram; a gauge is its last value.
    """
    import ray.util.metrics

    from defi_platform.metrics import metric

    values: dict[tuple[str, ...], float] = {}

    class Recorded:
        def __init__(self, name: str, description: str, *_: object, tag_keys: tuple[str, ...]) -> None:
            self._name, self._keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            values[self._name, *(tags[key] for key in self._keys)] = value

        def observe(self, value: float, tags: dict[str, str]) -> None:
            key = (self._name, *(tags[key] for key in self._keys))
            values[key] = values.get(key, 0) + value

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0, "Ray refuses it"
            self.observe(value, tags)

    monkeypatch.setattr(metric, "_connected", lambda: True)
    monkeypatch.setattr(metric, "_made", {})
    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(ray.util.metrics, kind, Recorded)
    return values


@pytest.fixture(scope="session")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """DeepSpeed wants a process group also for one process, and keeps the first that it meets."""
    import torch.distributed as distributed

    from defi_platform.train.engine.deepspeed_engine import prepare_process

    prepare_process(use_gpu=False, threads=1)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            patch.setenv(name, value)
        store = tmp_path_factory.mktemp("group") / "store"
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
        yield
        distributed.destroy_process_group()
