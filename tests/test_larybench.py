"""Exports for LARYBench, read as its commands read them."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from defi_models import presets
from defi_models.gidm import GIDM
from defi_models.layers.latent_actions import LatentActions
from defi_platform.config import CorpusConfig, DataConfig, LaryBenchConfig
from defi_platform.config.loader import load_config
from defi_platform.data.ingest import probe_actors
from defi_platform.errors import ConfigError, CorpusError
from defi_platform.larybench.export import export_larybench

sys.path.append(str(Path(__file__).parent / "data"))
from corpora import picture, write_lerobot, write_video

SIZE = 32
STRIDE = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "gidm"
    GIDM(presets.gidm("nano")).save_pretrained(folder)
    return folder


def settings(model: Path, output: Path, **values: Any) -> LaryBenchConfig:
    common = {"model": str(model), "output": str(output), "height": SIZE, "width": SIZE, "device": "cpu"}
    return LaryBenchConfig(**(common | {"dataset": "calvin", "stride": STRIDE} | values))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def latent(output: Path, row: dict[str, str]) -> dict[str, np.ndarray]:
    with np.load(output / "latent_actions" / row["la_path"]) as found:
        return dict(found)


def expected(model: Path, frames: np.ndarray, text: str = "") -> Any:
    with torch.no_grad():
        return GIDM.from_pretrained(model).eval().encode(torch.from_numpy(frames)[None], [text])


def pair_table(folder: Path, rows: int) -> Path:
    """A table of CALVIN's columns, with pictures in `images`; those of row 1 are absent."""
    lines = ["dataset,src_img,tgt_img,action"]
    for row in range(rows):
        names = [f"ep_{row}/frame_{frame:06d}.png" for frame in (0, STRIDE)]
        lines.append(f"CALVIN,{names[0]},{names[1]},ep_{row}/action_000000to000002.npy")
        for number, name in enumerate(names if row != 1 else []):
            (folder / "images" / f"ep_{row}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(10 * row + number, SIZE)).save(folder / "images" / name)
    (folder / "calvin_metadata_val.csv").write_text("\n".join(lines) + "\n")
    return folder / "calvin_metadata_val.csv"


def test_pairs_of_a_table_of_larybench_get_their_latent_actions(model: Path, tmp_path: Path) -> None:
    metadata, output = pair_table(tmp_path / "calvin", 3), tmp_path / "out"
    given = settings(
        model, output, metadata=str(metadata), pictures=str(tmp_path / "calvin"), split="val", name="defi"
    )
    done = export_larybench(given)
    rows = table(output / "data" / f"val_la_calvin_{STRIDE}_defi.csv")
    assert [row["src_img"] for row in rows] == ["ep_0/frame_000000.png", "ep_2/frame_000000.png"]
    assert list(rows[0]) == ["dataset", "src_img", "tgt_img", "action", "la_path"]
    assert rows[1]["la_path"] == "calvin/val/defi/latent_action_00000002.npz", "the number of its row there"
    assert done.rows == 2 and done.skipped == {"missing": 1}
    assert "ep_1/frame_000000.png is neither in" in done.text()
    found, wanted = latent(output, rows[1]), expected(model, np.stack([picture(20, SIZE), picture(21, SIZE)]))
    assert found["tokens"].dtype == np.float32 and found["indices"].dtype == np.int64
    np.testing.assert_array_equal(found["tokens"], wanted.tokens[0])
    np.testing.assert_array_equal(found["indices"], wanted.indices[0])

    given.vectors = "latents"
    export_larybench(given)
    np.testing.assert_array_equal(latent(output, rows[1])["tokens"], wanted.latents[0])


def test_videos_of_a_table_of_larybench_get_one_latent_action_per_consecutive_pair(
    model: Path, tmp_path: Path
) -> None:
    write_video(tmp_path / "short.mp4", range(6), SIZE)
    write_video(tmp_path / "long.mp4", range(10), SIZE)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "m.csv").write_text(
        "video_path,action,sample_indices\n"
        'broken.mp4,cut,"0,1,2"\nshort.mp4,pour,"0,4,8"\nshort.mp4,pour,"0,4,5"\nlong.mp4,cut,"0,4,8"\n'
    )
    output = tmp_path / "out"
    given = settings(
        model,
        output,
        task="classification",
        dataset="human_1st",
        metadata=str(tmp_path / "m.csv"),
        pictures=str(tmp_path),
        split="train",
    )
    done = export_larybench(given)
    rows = table(output / "data" / "train_la_human_1st_gidm.csv")
    assert [row["action"] for row in rows] == ["pour", "pour", "cut"]
    assert sum(done.skipped.values()) == 1 and "left out: 1 " in done.text()
    short, same, long = (latent(output, row) for row in rows)
    tokens, dim = presets.gidm("nano").encoder.tokens, presets.gidm("nano").encoder.latent_dim
    assert short["tokens"].shape == long["tokens"].shape == (2, tokens, dim)
    assert short["indices"].shape == (2, tokens)
    np.testing.assert_array_equal(short["tokens"], same["tokens"], "frame 8 of 6 stands for the last one")
    assert (short["tokens"][1] != long["tokens"][1]).any()


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Six episodes of two tasks; action of step t in episode e is (e, t, 0, 1)."""
    monkeypatch.setattr(probe_actors, "FEW_FILES", 1000)  # in this process
    write_lerobot(tmp_path / "corpus", [12, 10, 14, 11, 13, 12])
    return DataConfig(
        corpora={"toy": CorpusConfig(path=str(tmp_path / "corpus"))},
        manifest=str(tmp_path / "manifest"),
        height=SIZE,
        width=SIZE,
        holdout=0.4,
    )


def test_corpora_of_ones_own_become_a_regression(model: Path, tmp_path: Path, corpus: DataConfig) -> None:
    output = tmp_path / "out"
    export_larybench(settings(model, output, dataset="toy", data=corpus))
    by_split = {
        name: table(output / "data" / f"{name}_la_toy_{STRIDE}_gidm.csv") for name in ("train", "val")
    }
    episodes = {}
    for name, rows in by_split.items():
        metadata = table(output / "data" / f"toy_metadata_{name}.csv")
        assert [row | {"la_path": "x"} for row in metadata] == [row | {"la_path": "x"} for row in rows]
        actions = [np.load(output / row["action"]) for row in rows]
        episodes[name] = {int(action[0, 0]) for action in actions}
        for row, action in zip(rows, actions, strict=True):
            first = int(Path(row["src_img"]).stem.removeprefix("frame_"))
            assert action.shape == (STRIDE, 4) and action.dtype == np.float32
            assert action[:, 1].tolist() == [first, first + 1, first + 2], "actions between the two frames"
            assert row["tgt_img"].endswith(f"frame_{first + STRIDE:06d}.png")
    assert episodes["train"] | episodes["val"] == set(range(6))
    assert not episodes["train"] & episodes["val"]
    row = by_split["val"][-1]
    frames = np.stack([np.asarray(Image.open(output / row[name])) for name in ("src_img", "tgt_img")])
    episode = int(np.load(output / row["action"])[0, 0])
    wanted = expected(model, frames, f"task {episode % 2}").tokens[0]
    np.testing.assert_allclose(latent(output, row)["tokens"], wanted, atol=1e-5)


def test_videos_of_one_id_in_two_corpora_keep_their_own_pictures_and_actions(
    model: Path, tmp_path: Path, corpus: DataConfig
) -> None:
    write_lerobot(tmp_path / "more", [13, 12, 10, 11, 12, 14])
    corpus.corpora["more"] = CorpusConfig(path=str(tmp_path / "more"))
    output = tmp_path / "out"
    export_larybench(settings(model, output, dataset="toy", data=corpus))
    rows = [row for name in ("train", "val") for row in table(output / "data" / f"{name}_la_toy_3_gidm.csv")]
    assert len({row["action"] for row in rows}) == len({row["src_img"] for row in rows}) == len(rows)


def test_corpora_of_ones_own_become_a_classification_by_text_that_the_model_does_not_see(
    model: Path, tmp_path: Path, corpus: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, texts, output = GIDM.encode, set[str](), tmp_path / "out"

    def watched(self: GIDM, frames: torch.Tensor, text: Sequence[str]) -> LatentActions:
        texts.update(text)
        return encode(self, frames, text)

    monkeypatch.setattr(GIDM, "encode", watched)
    done = export_larybench(settings(model, output, task="classification", dataset="toy", data=corpus))
    rows = [row for name in ("train", "val") for row in table(output / "data" / f"{name}_la_toy_gidm.csv")]
    assert texts == {""}
    assert done.rows == len(rows) == 6 and {row["action"] for row in rows} == {"task 0", "task 1"}
    numbers = [[int(number) for number in row["sample_indices"].split(",")] for row in rows]
    assert {len(one) for one in numbers} == {9}
    assert {one[0] for one in numbers} == {0, 12, 22, 36, 47, 60}, "frames of the file that episodes share"
    assert latent(output, rows[0])["tokens"].shape[0] == 8


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "set metadata=LARYBench's table, or name a labelled corpus"),
        ({"metadata": "m.csv"}, "metadata needs `pictures`"),
        ({"task": "ranking"}, "task is 'ranking'; choose regression or classification"),
        ({"dataset": "a/b"}, "dataset is 'a/b'; it has letters, digits"),
        ({"stride": 0}, "stride is 0"),
        (
            {"metadata": "absent.csv", "pictures": ".", "split": "val"},
            "absent.csv cannot be read as a CSV table",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(
    model: Path, tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_larybench(settings(model, tmp_path / "out", **values))


def test_tables_of_another_kind_and_tables_without_a_readable_row_are_refused(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.csv").write_text('video_path,action,sample_indices\nabsent.mp4,cut,"0,1"\n')
    given = settings(
        model, tmp_path / "out", metadata=str(tmp_path / "m.csv"), pictures=str(tmp_path), split="val"
    )
    with pytest.raises(ConfigError, match="has no column src_img or tgt_img; it has the columns video_path"):
        export_larybench(given)
    given.task = "classification"
    with pytest.raises(
        CorpusError, match="no row of the val split of calvin could be read; the first: missing"
    ):
        export_larybench(given)


def test_the_commands_of_the_documentation_are_valid() -> None:
    page = (Path(__file__).parents[1] / "docs" / "latent_actions.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"python jobs/export_larybench\.py (.+)", page)
    assert len(commands) == 2
    for command in commands:
        config = load_config(LaryBenchConfig, None, command.split())
        assert bool(config.metadata) != bool(config.data), "rows are LARYBench's or one's own"
