"""Makes the dataset of a recording: python -m defi_client.recording.assemble FOLDER, where its process was killed."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from defi_client.errors import RecordError, one_line
from defi_client.recording.lerobot import Camera, Episode, LeRobotWriter, Vector

STATE, ACTION = "observation.state", "action"


def episodes(folder: str | Path) -> list[Path]:
    """Folders of the finished episodes of a recording, in order."""
    found = (Path(folder) / "episodes").glob("*")
    return sorted(path for path in found if path.name.isdigit())


def assemble(folder: str | Path) -> Path:
    """Makes the dataset of a recording anew, of the episodes that are there.

    Args:
        folder: of the recording.

    Returns:
        The dataset's folder.

    Raises:
        RecordError: there is no recording, or no finished episode; one of them is damaged; the dataset cannot be
            written. The episodes stay as they are.
    """
    root = Path(folder)
    try:
        return _assembled(root)
    except OSError as error:
        raise RecordError(
            f"the dataset of {root} cannot be written: {one_line(error)}. Its episodes are kept: when there is room, run "
            f"python -m defi_client.recording.assemble {root}"
        ) from error


def _assembled(root: Path) -> Path:
    if not (root / "recording.json").is_file():
        raise RecordError(f"{root} holds no recording: it has no recording.json.")
    finished = episodes(root)
    if not finished:
        raise RecordError(f"{root} holds no finished episode.")
    settings = json.loads((root / "recording.json").read_text())
    sizes = _episode(finished[0], settings["cameras"])[0]["sizes"]
    new, final = root / "dataset.partial", root / "dataset"
    shutil.rmtree(new, ignore_errors=True)
    writer = LeRobotWriter(
        new,
        settings["fps"],
        [Camera(name, *sizes[name][:2]) for name in settings["cameras"]],
        [Vector(STATE, tuple(settings["state_names"])), Vector(ACTION, tuple(settings["action_names"]))],
        settings["robot"],
    )
    for path in finished:
        about, episode = _episode(path, settings["cameras"])
        if about["sizes"] != sizes:
            raise RecordError(
                f"{path} has pictures of {about['sizes']}, {finished[0]} of {sizes}; remove one of them."
            )
        writer.add(episode)
    writer.finish()
    if final.exists():
        shutil.rmtree(final)
    new.rename(final)
    return final


def _episode(path: Path, cameras: list[str]) -> tuple[dict[str, Any], Episode]:
    """Description of an episode in its folder, and the episode."""
    try:
        about = json.loads((path / "episode.json").read_text())
        with np.load(path / "vectors.npz") as vectors:
            values = {STATE: vectors["state"], ACTION: vectors["action"]}
        videos = {name: (path / f"{name}.mp4").read_bytes() for name in cameras}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise RecordError(f"{path} is damaged ({one_line(error)}); move it away to leave it out.") from error
    stats = {
        name: {key: np.asarray(value) for key, value in found.items()}
        for name, found in about["stats"].items()
    }
    return about, Episode(about["instruction"], videos, stats, about["length"], values)


def main(arguments: list[str]) -> int:
    """Runs the command. Returns: its exit code."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(assemble(arguments[0]))
    except RecordError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
