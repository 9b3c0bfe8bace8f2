"""An episode as a recording for Rerun's viewer: video, actions, reward and success on the time line of its steps."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from defi_platform import storage
from defi_platform.errors import ConfigError
from defi_platform.evaluate.results import steps as steps_table
from defi_platform.evaluate.results.evaluation import Evaluation

TIMELINE = "step"


def write_recordings(evaluation: Evaluation, folder: str, arm: str, most: int) -> list[str]:
    """Writes one .rrd file per episode, failed ones first.

    Args:
        evaluation: the results.
        folder: local folder for the files.
        arm: policy under test.
        most: number of episodes.

    Returns:
        The files' paths.

    Raises:
        ConfigError: rerun-sdk is not installed, or the arm has no episode with an outcome.
    """
    if importlib.util.find_spec("rerun") is None:
        raise ConfigError(
            "recordings for Rerun need rerun-sdk; install it with: pip install 'defi-platform[rerun]'"
        )
    rows = [row for row in evaluation.rows if row["arm"] == arm and row["success"] is not None]
    if not rows:
        raise ConfigError(
            f"{evaluation.output} has no outcome of '{arm}'; arms: {', '.join(evaluation.summary['arms'])}."
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    table = pq.read_table(
        storage.open_seekable(storage.join(evaluation.output, steps_table.FILE)), filters=[("arm", "=", arm)]
    )
    written = []
    for row in sorted(rows, key=lambda one: one["success"])[:most]:
        mine = pc.and_(pc.equal(table["task"], row["task"]), pc.equal(table["seed"], row["seed"]))
        path = str(Path(folder) / f"{arm}-{row['unit']}.rrd")
        _write(evaluation, row, table.filter(mine).to_pylist(), path)
        written.append(path)
    return written


def _write(evaluation: Evaluation, row: Mapping[str, Any], steps: list[dict[str, Any]], path: str) -> None:
    import rerun as rr

    name = f"{row['task']}, seed {row['seed']}"
    recording = rr.RecordingStream("defi_evaluation", recording_id=f"{evaluation.name} {name}")
    recording.save(path)
    recording.send_recording_name(f"{name}: {'solved' if row['success'] else 'not solved'}")
    names = evaluation.protocol["action"]["names"]
    for kind in ("action", "executed"):
        recording.log(kind, rr.SeriesLines(names=list(names)), static=True)
    if row["video"]:
        _log_video(
            recording, storage.read_bytes(storage.join(evaluation.output, row["video"])), evaluation, row
        )
    instruction = None
    for step in steps:
        recording.set_time(TIMELINE, sequence=step["step"])
        if step["subtask"] != instruction:
            instruction = step["subtask"]
            recording.log("instruction", rr.TextLog(row["subtasks"][instruction]["instruction"]))
        for kind in ("action", "executed"):
            recording.log(kind, rr.Scalars(step[kind]))
        recording.log("reward", rr.Scalars(step["reward"]))
        recording.log("success", rr.Scalars(float(step["success"])))
        if step["latency_ms"] is not None:
            recording.log("latency_ms", rr.Scalars(step["latency_ms"]))
    recording.flush()
    recording.disconnect()


def _log_video(recording: Any, content: bytes, evaluation: Evaluation, row: Mapping[str, Any]) -> None:
    """The video's frames at the steps that they show; the last one is the state after the last step."""
    import rerun as rr

    video = rr.AssetVideo(contents=content, media_type="video/mp4")
    recording.log("video", video, static=True)
    every = int(evaluation.summary["video_every"])
    times = video.read_frame_timestamps_nanos()
    for index, nanoseconds in enumerate(times):
        recording.set_time(TIMELINE, sequence=min(index * every, row["steps"]))
        recording.log("video", rr.VideoFrameReference(nanoseconds=int(nanoseconds)))
