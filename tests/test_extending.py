"""The examples of docs/extending.md, run as they stand there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from defi_platform.config import CorpusConfig, DataConfig, DecodeConfig, PretrainConfig, TrainConfig
from defi_platform.data.decode.messages import Probe, ProbeJob
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.loader.stream import local_batches
from defi_platform.data.sampling.sharding import Shard
from defi_platform.data.sources import formats
from defi_platform.data.sources.records import RejectedRecord, VideoRecord

sys.path.append(str(Path(__file__).parent / "data"))
from corpora import write_lerobot, write_video

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()


def example(name: str) -> ModuleType:
    """The Python block below `<!-- example: name -->`, as a module."""
    (code,) = re.findall(rf"<!-- example: {name} -->\n```python\n(.*?)```", PAGE, flags=re.DOTALL)
    module = ModuleType(f"extending_{name}")
    exec(compile(code, f"docs/extending.md ({name})", "exec"), module.__dict__)
    return module


def test_the_source_lists_its_videos_once_it_is_a_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"captions": example("source"), **formats.FORMATS}
    monkeypatch.setattr(formats, "FORMATS", known)
    write_video(tmp_path / "clips" / "a.mp4", range(12))
    entries = [
        {"file": "clips/a.mp4", "caption": "stripes that count"},
        {"file": "b.mp4", "caption": "nothing"},
    ]
    (tmp_path / "index.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    found = formats.format_of("mine", CorpusConfig(path=str(tmp_path)))
    assert found == "captions"
    video, absent = formats.listing(found, str(tmp_path), None)
    assert isinstance(video, VideoRecord) and isinstance(absent, RejectedRecord)
    assert (video.video_id, video.text) == ("clips/a.mp4", "stripes that count")
    assert video.bytes == (tmp_path / "clips" / "a.mp4").stat().st_size
    assert (absent.video_id, absent.reason) == ("b.mp4", "missing")
    with DecoderPool(DecodeConfig()) as pool:
        (answer,) = pool.run([ProbeJob(video.uri)])
    assert isinstance(answer, Probe) and answer.num_frames == 12


def test_the_recipe_trains_on_a_corpus(ray_cluster: None, tmp_path: Path) -> None:
    module = example("recipe")
    root = write_lerobot(tmp_path / "corpus", [14] * 8, actions=False)
    config = PretrainConfig(
        data=DataConfig(
            corpora={"mine": CorpusConfig(path=str(root))},
            manifest=str(tmp_path / "manifest"),
            pair_interval_s=0.5,
            holdout=0.3,
        ),
        train=TrainConfig(output=str(tmp_path / "run")),
    )
    recipe = module.NextFrameRecipe(config)
    recipe.prepare()
    plan = recipe.plan("train")
    assert recipe.fingerprint(plan) == plan.fingerprint()
    torch.manual_seed(0)
    model = recipe.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for batch in local_batches(plan, config.data, Shard.single(0, 48, 4)):
        loss = model(batch, generator=[torch.Generator() for _ in batch["sample"]])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.pt").exists()
