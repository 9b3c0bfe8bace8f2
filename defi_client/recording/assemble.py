"""Makes the dataset of a recording: python -m defi_client.recording.assemble FOLDER, where its process was killed."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from defi_client.errors import RecordError
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
        RecordError: there is no recording, or no finished episode.
    """
    root = Path(folder)
    if not (root / "recording.json").is_file():
        raise RecordError(f"{root} holds no recording: it has no recording.json.")
    finished = episodes(root)
    if not finished:
        raise RecordError(f"{root} holds no finished episode.")
    settings = json.loads((root / "recording.json").read_text())
    sizes = json.loads((finished[0] / "episode.json").read_text())["sizes"]
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
        about = json.loads((path / "episode.json").read_text())
        if about["sizes"] != sizes:
            raise RecordError(
                f"{path} has pictures of {about['sizes']}, {finished[0]} of {sizes}; remove one of them."
            )
        with np.load(path / "vectors.npz") as vectors:
            values = {STATE: vectors["state"], ACTION: vectors["action"]}
        stats = {
            name: {key: np.asarray(value) for key, value in found.items()}
            for name, found in about["stats"].items()
        }
        videos = {name: (path / f"{name}.mp4").read_bytes() for name in settings["cameras"]}
        writer.add(Episode(about["instruction"], videos, stats, about["length"], values))
    writer.finish()
    if final.exists():
        shutil.rmtree(final)
    new.rename(final)
    return final


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
