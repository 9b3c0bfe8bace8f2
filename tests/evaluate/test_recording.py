"""Recording: what is in the datasets, what is kept, what is replaced, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import decord
import numpy as np
import pyarrow.parquet as pq
import pytest

from defi_platform import storage
from defi_platform.config import RayConfig, RecordConfig
from defi_platform.errors import ConfigError, SimulatorError
from defi_platform.evaluate.benchmarks.interface import View
from defi_platform.evaluate.benchmarks.metaworld.benchmark import MetaWorld
from defi_platform.evaluate.record import record

BUTTON, COFFEE = "button-press-v3", "coffee-button-v3"


def small(output: Path, **changes: object) -> RecordConfig:
    config = RecordConfig(
        ray=RayConfig(),
        tasks=[COFFEE, BUTTON],
        episodes_per_task=2,
        labelled_per_task=1,
        seed=40,
        height=64,
        width=64,
        hold_steps=3,
        output=str(output),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    output = tmp_path_factory.mktemp("recorded") / "corpus"
    summary = record(small(output))
    assert (summary.episodes, summary.labelled_episodes, summary.reused) == (4, 2, False)
    return output


def rows_of(dataset: Path) -> list[dict]:
    return pq.read_table(dataset / "meta/episodes/chunk-000/file-000.parquet").to_pylist()


def tables_of(output: Path) -> list[dict]:
    found = []
    for name in ("video", "labelled"):
        found.append(pq.read_table(output / name / "data/chunk-000/file-000.parquet").to_pydict())
        found.append({"episodes": rows_of(output / name)})
    return found


def test_labelled_actions_replay_the_recorded_frames_to_success(recorded: Path) -> None:
    labelled = recorded / "labelled"
    episode = json.loads((labelled / "meta/recording.json").read_text())["episodes"][1]
    row = rows_of(labelled)[1]
    columns = pq.read_table(labelled / "data/chunk-000/file-000.parquet").to_pydict()
    span = slice(row["dataset_from_index"], row["dataset_to_index"])
    actions, states = np.array(columns["action"][span]), np.array(columns["observation.state"][span])
    video = decord.VideoReader(str(labelled / "videos/observation.images.workspace/chunk-000/file-000.mp4"))
    start = round(row["videos/observation.images.workspace/from_timestamp"] * 80)

    benchmark = MetaWorld(MetaWorld.default_view, {})
    state, solved = benchmark.reset(episode["task"], episode["seed"]), []
    assert episode["initial_positions"] == benchmark.initial_positions() != {}
    assert row["tasks"] == ["press the button from the front"]
    for step, action in enumerate(actions):
        assert np.array_equal(state, states[step].astype(np.float32))
        if step % 16 == 0:
            difference = video[start + step].asnumpy().astype(int) - benchmark.render()["workspace"]
            assert np.abs(difference).mean() < 6, "the picture of that very step, but for compression"
        result = benchmark.step(action.astype(np.float32))
        state = result.state
        solved.append(result.success)
    benchmark.close()
    assert solved.index(True) == len(actions) - 1 - 3, "it ends hold_steps after the first success"


def test_the_video_dataset_holds_every_episode_and_no_action_or_state(recorded: Path) -> None:
    info = json.loads((recorded / "video/meta/info.json").read_text())
    assert info["total_episodes"] == 4 and info["fps"] == 80
    keys = {"observation.images.workspace"}
    index = {"timestamp", "frame_index", "episode_index", "index", "task_index"}
    assert set(info["features"]) == keys | index
    assert set(pq.read_schema(recorded / "video/data/chunk-000/file-000.parquet").names) == index
    assert [row["tasks"][0] for row in rows_of(recorded / "video")] == [
        "press the button of the coffee machine"
    ] * 2 + ["press the button from the front"] * 2


def test_a_finished_recording_is_recognised_and_left_alone(recorded: Path) -> None:
    before = {entry.name: entry.version for entry in storage.walk(str(recorded))}
    summary = record(small(recorded, workers=1))
    assert summary.reused and "already recorded" in summary.summary()
    assert {entry.name: entry.version for entry in storage.walk(str(recorded))} == before


def test_a_recording_with_other_settings_is_not_mixed_into_it(recorded: Path) -> None:
    with pytest.raises(ConfigError, match=r"other settings \(seed: 40 there, 3 here; view"):
        record(small(recorded, cameras=["corner2"], seed=3))


def test_the_number_of_workers_does_not_change_the_content(
    recorded: Path, tmp_path: Path, ray_cluster: None
) -> None:
    record(small(tmp_path / "one", workers=1))
    assert tables_of(tmp_path / "one") == tables_of(recorded)


def test_failed_attempts_are_counted_and_replaced_by_the_next_seeds(
    tmp_path: Path, ray_cluster: None
) -> None:
    # How long the script needs depends on the seed, so a tight limit fails some of them.
    benchmark = MetaWorld(View(("workspace",), 16, 16), {})
    needed = {}
    for seed in range(40, 48):
        benchmark.reset(BUTTON, seed)
        needed[seed] = 1 + next(s for s in range(150) if benchmark.step(benchmark.expert_action()).success)
    benchmark.close()
    limit = sorted(needed.values())[5]
    solvable = [seed for seed, steps in needed.items() if steps <= limit]
    summary = record(
        small(tmp_path / "c", tasks=[BUTTON], episodes_per_task=4, labelled_per_task=0, max_steps=limit)
    )
    sources = json.loads((tmp_path / "c/video/meta/recording.json").read_text())["episodes"]
    assert [source["seed"] for source in sources] == solvable[:4]
    assert summary.failures == {BUTTON: solvable[3] - 40 - 3}
    assert not (tmp_path / "c/labelled").exists()


def test_an_expert_that_keeps_failing_is_one_clear_error(tmp_path: Path, ray_cluster: None) -> None:
    with pytest.raises(SimulatorError, match=r"button-press-v3: the expert failed .* raise max_steps"):
        record(small(tmp_path / "c", tasks=[BUTTON], max_steps=5))
    assert not (tmp_path / "c/video").exists() and not (tmp_path / "c/recording.json").exists()


def test_noise_moves_the_hand_but_not_the_labels(tmp_path: Path, ray_cluster: None) -> None:
    record(small(tmp_path / "c", tasks=[COFFEE], episodes_per_task=1, noise=0.3))
    columns = pq.read_table(tmp_path / "c/labelled/data/chunk-000/file-000.parquet").to_pydict()
    actions, states = np.array(columns["action"]), np.array(columns["observation.state"])
    benchmark = MetaWorld(View(("workspace",), 16, 16), {})
    state = benchmark.reset(COFFEE, 40)
    assert np.array_equal(actions[0].astype(np.float32), benchmark.expert_action())
    for action in actions[:10]:
        state = benchmark.step(action.astype(np.float32)).state
    benchmark.close()
    assert np.abs(states[10] - state).max() > 1e-4, "what was carried out was not the label"
    assert np.abs(actions).max() <= 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ["drawer-shut-v3"]}, "no task 'drawer-shut-v3'"),
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": [BUTTON, BUTTON]}, "twice"),
        ({"cameras": ["front"]}, "no camera 'front'"),
        ({"benchmark": "metaworl"}, "none of the name 'metaworl'"),
        ({"benchmark": "libero", "tasks": ["libero_goal"]}, "libero has no expert for libero_goal/"),
        ({"benchmark": "libero", "tasks": ["libero_spatial"], "seed": 49}, "50 per task, from 0 to 49"),
        ({"height": 65}, "must be even"),
        ({"labelled_per_task": 3}, "labelled_per_task (3) is more than episodes_per_task (2)"),
        ({"episodes_per_task": 0}, "episodes_per_task is 0"),
        ({"noise": -0.1}, "noise is -0.1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_anything_starts(
    changes: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        record(small(tmp_path / "c", **changes))
    assert message in str(error.value)
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_an_interrupted_job_goes_on_where_it_was(repository: Path, tmp_path: Path, recorded: Path) -> None:
    output = tmp_path / "corpus"
    command = [
        sys.executable,
        str(repository / "jobs/record_demos.py"),
        f"tasks=[{COFFEE},{BUTTON}]",
        "episodes_per_task=2",
        "labelled_per_task=1",
        "seed=40",
        "hold_steps=3",
        "workers=1",
        f"output={output}",
    ]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(output.glob(".attempts/*.npz")) and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=240)
    assert job.returncode == 130 and "run the same command again" in errors
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob(".attempts/*.npz")}
    assert 1 <= len(kept) < 4
    assert not (output / "video").exists() and not (output / "recording.json").exists()

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "4 episodes of 2 tasks" in done.stdout
    assert tables_of(output) == tables_of(recorded)
    assert not (output / ".attempts").exists()


@pytest.mark.slow
def test_the_job_without_egl_says_so_and_leaves_nothing_that_looks_finished(
    repository: Path, tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    done = subprocess.run(
        [
            sys.executable,
            str(repository / "jobs/record_demos.py"),
            f"tasks=[{COFFEE}]",
            f"output={tmp_path / 'corpus'}",
        ],
        env={**environment, "PYOPENGL_PLATFORM": "glx"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    # On a busy machine a line of Ray's own process may be among them.
    errors = [line for line in done.stderr.splitlines() if "Error" in line and "(pid=gcs_server)" not in line]
    assert len(errors) == 1 and errors[0].startswith("SimulatorError: EGL") and "apt-get" in errors[0]
    assert not (tmp_path / "corpus/video").exists()
    assert not (tmp_path / "corpus/recording.json").exists()
