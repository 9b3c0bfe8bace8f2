"""Records what a robot executed: each episode as soon as it ends, all of them as one LeRobot v3.0 dataset.

FOLDER/recording.json      rate, cameras and names
FOLDER/episodes/000000/    one episode: a video per camera, states and actions; remove the folder to leave it out
FOLDER/dataset/            the dataset, made of them by `Recorder.close` or `python -m defi_client.recording.assemble FOLDER`
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from defi_client.errors import RecordError, one_line
from defi_client.recording.assemble import assemble, episodes
from defi_client.recording.h264 import Encoder
from defi_client.recording.lerobot import frame_stats

WAITING_S = 4.0
"""Seconds of frames that may wait to be encoded; a computer that is slower than that loses the episode, not control."""
SAMPLE = 64
"""Frames of an episode that its video statistics are of, at most."""


class Recorder:
    """Records episodes into a folder; a context manager, which makes the dataset when it is left.

    A frame is a step at which an action was executed: what the robot saw just before, and the action as it was
    executed, after all limits. Steps at which it held its position are no frames.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fps: int,
        cameras: Sequence[str],
        state_names: Sequence[str],
        action_names: Sequence[str],
        robot: str = "unknown",
    ) -> None:
        """Opens a recording, or goes on with one of the same settings.

        Args:
            folder: of the recording.
            fps: rate of the control loop.
            cameras: those of the robot that are recorded.
            state_names: one for each number of the state.
            action_names: one for each number of an action.
            robot: its type, as LeRobot's `robot_type`.

        Raises:
            RecordError: the folder has a recording of other settings, or cannot be written; the rate or a camera's
                name cannot be recorded.
        """
        if fps != int(fps) or fps < 1:
            raise RecordError(
                f"{folder}: fps is {fps}; a LeRobot dataset has whole frames per second, 1 or more."
            )
        unnameable = [name for name in cameras if not name or "/" in name or name in (".", "..")]
        if unnameable:
            raise RecordError(
                f"{folder}: a camera cannot be named '{unnameable[0]}'; its name is part of a path."
            )
        fps = int(fps)
        self.folder, self.fps = Path(folder), fps
        self._cameras = tuple(cameras)
        self._settings: dict[str, Any] = {
            "fps": fps,
            "robot": robot,
            "cameras": list(cameras),
            "state_names": list(state_names),
            "action_names": list(action_names),
        }
        self.unrecorded: dict[int, str] = {}
        """Numbers of episodes that were lost, and why."""
        self.empty = 0
        """Episodes without an action."""
        self._queue: queue.Queue[Any] = queue.Queue(max(1, int(WAITING_S * fps)))
        self._thread: threading.Thread | None = None
        self._problem = ""
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._number = self._open()

    def begin(self, instruction: str, images: dict[str, np.ndarray[Any, Any]]) -> None:
        """Begins an episode.

        Args:
            instruction: what the robot is to do.
            images: by camera, as those of every frame.

        Raises:
            RecordError: a camera is missing, or its pictures cannot be recorded.
        """
        for name in self._cameras:
            image = images.get(name)
            if image is None:
                raise RecordError(
                    f"{self.folder}: the robot has no camera '{name}', it has {sorted(images)}."
                )
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise RecordError(
                    f"{self.folder}: '{name}' gives {image.dtype} {image.shape}, not uint8 (H, W, 3)."
                )
            if image.shape[0] % 2 or image.shape[1] % 2:
                raise RecordError(f"{self.folder}: '{name}' is {image.shape[:2]}; video needs even sizes.")
            if self._sizes.setdefault(name, image.shape) != image.shape:
                raise RecordError(
                    f"{self.folder}: '{name}' was {self._sizes[name]}, and is {image.shape} now."
                )
        self._problem = ""
        self._thread = threading.Thread(target=self._record, args=(instruction,), name="recorder")
        self._thread.start()

    def add(
        self,
        images: dict[str, np.ndarray[Any, Any]],
        state: np.ndarray[Any, Any],
        action: np.ndarray[Any, Any],
    ) -> None:
        """Takes a frame and returns at once.

        Args:
            images: by camera; not to be written to afterwards.
            state: (S,) before the action.
            action: (A,) as executed.
        """
        if self._problem:
            return
        frame = ({name: images[name] for name in self._cameras}, np.array(state), np.array(action))
        try:
            self._queue.put_nowait(frame)
        except queue.Full:
            self._problem = f"encoding is more than {WAITING_S:.0f} s behind; record smaller pictures"

    def end(self) -> None:
        """Ends the episode; returns when it is on disk, or is known to be lost (`unrecorded`)."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._queue.put(None)
        thread.join()
        if self._problem:
            self.unrecorded[self._number] = self._problem
        self._number += 1

    def close(self) -> Path | None:
        """Makes the dataset of all episodes.

        Returns:
            Its folder; None where there is no episode.

        Raises:
            RecordError: some episodes were lost; the dataset holds the others.
        """
        self.end()
        made = assemble(self.folder) if episodes(self.folder) else None
        if self.unrecorded:
            words = "; ".join(f"episode {number}: {why}" for number, why in self.unrecorded.items())
            raise RecordError(f"{self.folder} lacks {len(self.unrecorded)} episodes. {words}.")
        return made

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> int:
        file = self.folder / "recording.json"
        try:
            (self.folder / "episodes").mkdir(parents=True, exist_ok=True)
            if not file.exists():
                whole = file.with_name("recording.json.partial")
                whole.write_text(json.dumps(self._settings, indent=1))
                whole.replace(file)
            there = json.loads(file.read_text())
        except OSError as error:
            raise RecordError(f"{self.folder} cannot be written: {one_line(error)}.") from error
        except ValueError as error:
            raise RecordError(
                f"{file} is damaged ({one_line(error)}); record into another folder."
            ) from error
        other = [name for name, value in self._settings.items() if there.get(name) != value]
        if other:
            raise RecordError(
                f"{self.folder} has a recording with another {', '.join(other)}; record into another folder."
            )
        for path in episodes(self.folder)[:1]:
            sizes = json.loads((path / "episode.json").read_text())["sizes"]
            self._sizes = {name: tuple(size) for name, size in sizes.items()}
        # Episodes that a killed process began have their numbers too.
        stems = [path.name.partition(".")[0] for path in (self.folder / "episodes").iterdir()]
        return max((int(stem) for stem in stems if stem.isdigit()), default=-1) + 1

    def _record(self, instruction: str) -> None:
        """Encodes frames until the episode ends. The queue is emptied whatever happens."""
        encoders: dict[str, Encoder] = {}
        samples: dict[str, list[Any]] = {name: [] for name in self._cameras}
        states: list[Any] = []
        actions: list[Any] = []
        stride = 1
        while True:
            frame = self._queue.get()
            if frame is None:
                break
            if self._problem:
                continue
            images, state, action = frame
            try:
                for name, image in images.items():
                    if image.shape != self._sizes[name]:
                        raise ValueError(f"'{name}' was {self._sizes[name]}, and became {image.shape}")
                    if name not in encoders:
                        encoders[name] = Encoder(image.shape[0], image.shape[1], self.fps)
                    encoders[name].add(image)
                    if len(states) % stride == 0:
                        samples[name].append(image)
            except Exception as error:  # noqa: BLE001 - the episode is lost, and says why
                self._problem = one_line(error)
            states.append(state)
            actions.append(action)
            if len(states) == SAMPLE * stride:
                samples = {name: taken[::2] for name, taken in samples.items()}
                stride *= 2
        if not states or self._problem:
            self.empty += not states and not self._problem
            return
        try:
            self._store(instruction, encoders, samples, np.stack(states), np.stack(actions))
        except Exception as error:  # noqa: BLE001 - the episode is lost, and says why
            self._problem = one_line(error)

    def _store(
        self,
        instruction: str,
        encoders: dict[str, Encoder],
        samples: dict[str, list[Any]],
        states: np.ndarray[Any, Any],
        actions: np.ndarray[Any, Any],
    ) -> None:
        for name, values in (("state_names", states), ("action_names", actions)):
            if values.shape[1:] != (len(self._settings[name]),):
                raise ValueError(
                    f"{name} has {len(self._settings[name])} names for an array {values.shape[1:]}"
                )
        final = self.folder / "episodes" / f"{self._number:06d}"
        partial = final.with_name(f"{final.name}.partial")
        partial.mkdir()
        stats = {}
        for name, encoder in encoders.items():
            (partial / f"{name}.mp4").write_bytes(encoder.finish())
            found = frame_stats(np.stack(samples[name]))
            stats[name] = {key: value.tolist() for key, value in found.items()}
        np.savez(partial / "vectors.npz", state=states.astype(np.float32), action=actions.astype(np.float32))
        about = {"instruction": instruction, "length": len(states), "sizes": self._sizes, "stats": stats}
        (partial / "episode.json").write_text(json.dumps(about))
        partial.rename(final)
