"""Every way from a source frame to a model resizes it alike, byte for byte."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from corpora import manifest_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tfrecords import bytes_list, example, write_tfrecord

from defi_platform.config import DataConfig
from defi_platform.data.decode.messages import DecodeJob
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.decode.resize import resize
from defi_platform.data.decode.worker_jobs import JobHandler
from defi_platform.data.loader.sample_decoder import decode_job
from defi_platform.data.loader.stream import local_batches
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ClipRule
from defi_platform.data.sampling.sharding import Shard
from defi_platform.data.sources.uri import video_uri
from defi_platform.serve.observation import ANY_CAMERA, PolicySpec, read_observation

SIDES = st.integers(1, 90)


def picture(height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): slopes and noise, so that a shift or another filter shows."""
    rng = np.random.default_rng(height * 1000 + width)
    slopes = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None]
    return np.asarray(slopes + rng.integers(0, 6, (height, width, 3)), np.uint8)


# --------------------------------------------------------------------------- the function


@settings(max_examples=60, deadline=None)
@given(source=st.tuples(SIDES, SIDES), target=st.tuples(SIDES, SIDES))
def test_the_centred_box_of_the_targets_aspect_is_scaled(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    frame = picture(*source)
    result = resize(frame, target)
    assert result.shape == (*target, 3) and result.dtype == np.uint8
    (h, w), (height, width) = source, target
    scale = min(h / height, w / width)
    top, left = max(0.0, (h - height * scale) / 2), max(0.0, (w - width * scale) / 2)
    box = (left, top, w - left, h - top)
    whole = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BILINEAR, box))
    # Pillow scales rows or columns first depending on the picture's size, which moves its rounding.
    assert np.abs(whole.astype(int) - result).max() <= 2
    if h * width == w * height:
        assert (whole == result).all()


@settings(max_examples=30, deadline=None)
@given(source=st.tuples(SIDES, SIDES), target=st.tuples(SIDES, SIDES))
def test_arrays_views_and_images_give_the_same_bytes(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    frame = picture(*source)
    once = resize(frame, target)
    assert (resize(Image.fromarray(frame), target) == once).all()
    turned = np.ascontiguousarray(np.rot90(frame))
    assert (resize(np.rot90(turned, -1), target) == once).all()


def test_a_frame_of_the_right_size_is_not_touched() -> None:
    frame = picture(32, 48)
    frame.flags.writeable = False  # as arrays from the wire are
    assert resize(frame, (32, 48)) is frame


def test_wide_and_tall_pictures_lose_their_sides_alone() -> None:
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 48:144] = 200
    assert (resize(wide, (32, 48))[:, 2:-2] == 200).all()
    assert (resize(np.rot90(wide), (48, 32))[2:-2] == 200).all()


# --------------------------------------------------------------------------- the paths


def in_calvin(frame: np.ndarray, folder: Path) -> str:
    np.savez(folder / "episode_0000000.npz", rgb_static=frame)
    return video_uri(str(folder), "calvin", 0, 0, "rgb_static")


def in_hdf5(frame: np.ndarray, folder: Path) -> str:
    with h5py.File(folder / "episode_0.hdf5", "w") as file:
        file["observations/images/front"] = frame[None]
    return video_uri(str(folder / "episode_0.hdf5"), "hdf5", "front")


def in_rlds(frame: np.ndarray, folder: Path) -> str:
    png = io.BytesIO()
    Image.fromarray(frame).save(png, "png")
    path = folder / "x.tfrecord-00000-of-00001"
    write_tfrecord(path, [example({"steps/observation/image": bytes_list([png.getvalue()])})])
    return video_uri(str(path), "rlds", 12, path.stat().st_size - 16, "image")


def in_video(frame: np.ndarray, folder: Path) -> str:
    path = folder / "x.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width, stream.pix_fmt = *frame.shape[:2], "bgr0"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return str(path)


@pytest.mark.parametrize("store", [in_calvin, in_hdf5, in_rlds, in_video])
@pytest.mark.parametrize("source", [(84, 84), (60, 80), (200, 120)])
def test_files_frame_stores_and_serving_give_the_same_bytes(
    store: Callable[[np.ndarray, Path], str], source: tuple[int, int], tmp_path: Path
) -> None:
    frame = picture(*source)
    uri = store(frame, tmp_path)
    for size in [(64, 64), (224, 224), (48, 96), source]:
        decoded = np.zeros((1, *size, 3), np.uint8)
        JobHandler(1 << 30).decode(DecodeJob(uri, (0,), *size, *source), decoded)
        spec = PolicySpec(
            policy="p",
            preset="nano",
            cameras=(ANY_CAMERA,),
            image_size=size,
            state_dim=0,
            action_dim=1,
            chunk=1,
        )
        asked = read_observation({"observation/images/any": frame, "prompt": "x", "seed": 0}, spec)
        assert (decoded[0] == resize(frame, size)).all()
        assert (asked.images[0] == decoded[0]).all()


def test_training_validation_and_the_cache_give_the_same_bytes(tmp_path: Path) -> None:
    frame, size = picture(60, 80), (64, 48)
    row = {
        "corpus": "c", "video_id": "v", "uri": in_video(frame, tmp_path), "camera": "main", "episode_id": "", "text": "t",
        "split": "train", "num_frames": 2, "fps": 10.0, "num_actions": 0, "first_frame": 0, "version": "1",
        "height": 60, "width": 80,
    }  # fmt: skip
    manifest = manifest_of([row])
    data = DataConfig(height=size[0], width=size[1], holdout=0.0)
    with DecoderPool(data.decode) as pool:  # as jobs/encode_latents.py does
        (cached,) = pool.run([decode_job(manifest, data, 0, (0, 1))])
    assert isinstance(cached, np.ndarray)
    plan = Plan(manifest, {"c": 1.0}, ClipRule(frames=2), seed=0)
    (batch,) = local_batches(plan, data, Shard.single(0, 1, 1))
    assert (cached == resize(frame, size)).all() and (batch["frames"][0].numpy() == cached).all()
