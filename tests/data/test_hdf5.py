"""HDF5 files of strangers: nothing outside of a file is read through it, and what it claims is checked before."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from defi_platform.config import CorpusConfig, DataConfig
from defi_platform.data.decode.frame_stores import decoded_image, open_store
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.loader.robot_signals import statistics
from defi_platform.data.manifest.commit_marker import read_committed
from defi_platform.data.rejection import BadVideo
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ChunkRule
from defi_platform.data.sources.formats import listing, read_signals
from defi_platform.data.sources.records import RejectedRecord, VideoRecord
from defi_platform.data.sources.uri import parse, video_uri
from defi_platform.errors import CorpusError

FRAMES = np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
FRONT = "observations/images/front"


def secret(path: Path) -> Path:
    """Another file of this machine, both as raw bytes and as HDF5."""
    place = path.parent / "elsewhere"
    place.mkdir()
    (place / "raw").write_bytes(FRAMES.tobytes())
    with h5py.File(place / "s.h5", "w") as file:
        file[FRONT] = FRAMES
        file["action"] = np.zeros((4, 2))
        file["text"] = "secret"
    return place


def external_storage(file: h5py.File, place: Path) -> None:
    file.create_dataset(FRONT, FRAMES.shape, "u1", external=[(str(place / "raw"), 0, FRAMES.nbytes)])


def external_link(file: h5py.File, place: Path) -> None:
    file[FRONT] = h5py.ExternalLink(str(place / "s.h5"), FRONT)


def external_group(file: h5py.File, place: Path) -> None:
    file["observations"] = h5py.ExternalLink(str(place / "s.h5"), "observations")


def soft_link_out(file: h5py.File, place: Path) -> None:
    file["hidden"] = h5py.ExternalLink(str(place / "s.h5"), "/")
    file[FRONT] = h5py.SoftLink(f"/hidden/{FRONT}")


def virtual(file: h5py.File, place: Path) -> None:
    layout = h5py.VirtualLayout(FRAMES.shape, "u1")
    layout[:] = h5py.VirtualSource(str(place / "s.h5"), FRONT, shape=FRAMES.shape)
    file.create_virtual_dataset(FRONT, layout)


def outside_text(file: h5py.File, place: Path) -> None:
    file[FRONT] = FRAMES
    file["text"] = h5py.ExternalLink(str(place / "s.h5"), "text")


def outside_action(file: h5py.File, place: Path) -> None:
    file[FRONT] = FRAMES
    file["action"] = h5py.ExternalLink(str(place / "s.h5"), "action")


def circle(file: h5py.File, place: Path) -> None:
    file[FRONT] = h5py.SoftLink(f"/{FRONT}")


def long_text(file: h5py.File, place: Path) -> None:
    file[FRONT] = FRAMES
    file.create_dataset("text", (1 << 20,), "S1000000", chunks=(1,))


@pytest.mark.parametrize(
    "make",
    [external_storage, external_link, external_group, soft_link_out, virtual, outside_text, outside_action, circle,
     long_text],
)  # fmt: skip
def test_what_lies_outside_of_a_file_is_not_read_and_the_others_are(
    tmp_path: Path, make: Callable[[h5py.File, Path], None]
) -> None:
    root = tmp_path / "c"
    root.mkdir()
    with h5py.File(root / "bad.hdf5", "w") as file:
        make(file, secret(root))
    with h5py.File(root / "good.hdf5", "w") as file:
        file["data"] = FRAMES
        file[FRONT] = h5py.SoftLink("/data")  # within itself, which is usual
    items = list(listing("hdf5", str(root), 5.0))
    assert {i.video_id: i.reason for i in items if isinstance(i, RejectedRecord)} == {"bad": "bad_source"}
    (good,) = (item for item in items if isinstance(item, VideoRecord))
    assert (np.asarray(open_store(parse(good.uri)).picture(1)) == FRAMES[1]).all()
    if make not in (outside_text, outside_action, long_text):
        with pytest.raises(BadVideo, match="unreadable"):
            open_store(parse(video_uri(str(root / "bad.hdf5"), "hdf5", "front")))


@pytest.mark.parametrize(
    ("values", "right"),
    [
        (FRAMES.astype(np.float32), FRAMES),
        (np.concatenate([FRAMES, FRAMES[..., :1]], 3), FRAMES),
        (FRAMES[..., :1], FRAMES[..., [0, 0, 0]]),
        (FRAMES[..., 0], FRAMES[..., [0, 0, 0]]),
        (FRAMES / 255, None),
        (FRAMES.astype(np.uint16) * 257, None),
        (FRAMES.astype(np.int8), None),
        (FRAMES.transpose(0, 3, 1, 2), None),
        (np.full(FRAMES.shape, np.nan), None),
    ],
)
def test_pictures_of_other_numbers_and_channels_come_out_right_or_not_at_all(
    tmp_path: Path, values: np.ndarray, right: np.ndarray | None
) -> None:
    with h5py.File(tmp_path / "e.hdf5", "w") as file:
        file[FRONT] = values
    store = open_store(parse(video_uri(str(tmp_path / "e.hdf5"), "hdf5", "front")))
    if right is None:
        with pytest.raises(BadVideo, match="corrupt"):
            store.picture(3)
    else:
        assert np.array_equal(np.asarray(store.picture(3)), right[3])


def test_depth_in_a_png_is_no_picture() -> None:
    content = io.BytesIO()
    Image.fromarray(np.full((8, 8), 1500, np.uint16)).save(content, "PNG")
    with pytest.raises(BadVideo, match="more than 8 bits"):
        decoded_image(content.getvalue(), "step 0")


def test_a_camera_may_have_any_name_and_a_frame_no_size(tmp_path: Path) -> None:
    camera = "cam,left#1 50%"
    with h5py.File(tmp_path / "e,0#x.hdf5", "w") as file:
        file[f"observations/images/{camera}"] = FRAMES
        file.create_dataset("observations/images/vast", (2, 1 << 20, 1 << 20, 3), "u1", chunks=(1, 1, 1, 3))
        file["action"] = np.array([[0.0, 1.0], [np.nan, 1.0]])
    items = list(listing("hdf5", str(tmp_path), 5.0))
    by_camera = {item.camera: item for item in items if isinstance(item, VideoRecord)}
    assert open_store(parse(by_camera[camera].uri)).num_frames == 4
    with pytest.raises(BadVideo, match="memory"):
        open_store(parse(by_camera["vast"].uri))
    (uri,) = {record.signals_uri for record in by_camera.values()}
    with pytest.raises(CorpusError, match="step 1 has a value that is no finite number"):
        read_signals("hdf5", uri, "e,0#x")


def test_unusable_actions_of_the_first_episode_cost_no_other_its_own(tmp_path: Path) -> None:
    nan = np.zeros((4, 2))
    nan[2, 1] = np.nan
    for number, actions in enumerate(
        [np.zeros((4, 5)), nan, np.zeros((0, 2)), np.ones((4, 2)), np.ones((4, 2))]
    ):
        with h5py.File(tmp_path / f"{number}.hdf5", "w") as file:
            file[FRONT] = FRAMES + np.uint8(number)
            file["action"] = actions
    config = DataConfig(
        corpora={"c": CorpusConfig(path=str(tmp_path), fps=5.0)}, manifest=str(tmp_path / "m"), holdout=0.0
    )
    manifest = ingest(config)
    committed = read_committed(config.manifest, "c")
    assert committed is not None and committed.notes["bad_actions"][0] == 3
    plan = Plan(manifest, {"c": 1.0}, ChunkRule(2), 0, split="train")
    assert plan.excluded == {"c: bad_actions, listed by the ingest": 3}
    found = statistics(plan)["action"]
    assert found.count == 8 and found.mean.tolist() == [1, 1]
