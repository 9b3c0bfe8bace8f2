"""Actions and states at ingest: unusable ones are listed, the others are laid out once and read from there."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import numbers_of, spoil, write_lerobot

from defi_platform.config import CorpusConfig, DataConfig
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.loader.robot_signals import SignalReader, state_layout, statistics
from defi_platform.data.loader.sample_decoder import SampleDecoder
from defi_platform.data.manifest.commit_marker import read_committed
from defi_platform.data.manifest.table import Manifest
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import ChunkRule, ClipRule
from defi_platform.data.sources import formats
from defi_platform.data.tables.signal_file import BATCH_ROWS, SignalFile, SignalLayout, write_signals
from defi_platform.errors import ConfigError

LENGTHS = [20, 16, 12, 18]

Rows = dict[str, list[Any]]


def configured(tmp_path: Path) -> DataConfig:
    corpora = {"c": CorpusConfig(path=str(tmp_path / "c"))}
    return DataConfig(corpora=corpora, manifest=str(tmp_path / "m"), holdout=0.0)


def dimensions(plan: Plan) -> tuple[int, int]:
    """(A, P) of the plan's first episode."""
    signals = SignalReader(plan.states).of_row(plan.manifest, int(plan.first_rows()[0]))
    return signals.actions.shape[1], 0 if signals.proprio is None else signals.proprio.shape[1]


def edited(root: Path, edit: Callable[[Rows], None]) -> None:
    path = root / "data" / "chunk-000" / "file-000.parquet"
    rows = pq.read_table(path).to_pydict()
    edit(rows)
    pq.write_table(pa.table(rows), path)


def row_of(rows: Rows, episode: int, frame: int) -> int:
    return list(zip(rows["episode_index"], rows["frame_index"], strict=True)).index((episode, frame))


def without_rows(rows: Rows) -> None:
    del_from = row_of(rows, 1, 10)
    for values in rows.values():
        del values[del_from : del_from + 6]


def ragged(rows: Rows) -> None:
    rows["action"][row_of(rows, 1, 3)] = [1.0]


def null(rows: Rows) -> None:
    rows["observation.state"][row_of(rows, 1, 3)] = None


def not_a_number(rows: Rows) -> None:
    rows["action"][row_of(rows, 1, 3)][2] = float("nan")


def infinite(rows: Rows) -> None:
    rows["observation.state"][row_of(rows, 1, 3)][0] = float("-inf")


def wider(rows: Rows) -> None:
    for frame in range(LENGTHS[1]):
        rows["action"][row_of(rows, 1, frame)] = [0.0] * 5


def twice(rows: Rows) -> None:
    rows["frame_index"][row_of(rows, 1, 3)] = 4


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without_rows, "10 rows of actions for 16 frames"),
        (ragged, "rows of 1 and of 4 numbers"),
        (null, "observation.state is null in 1 of 16 rows"),
        (not_a_number, "actions hold nan in row 3, entry 2"),
        (infinite, "states hold -inf in row 3, entry 0"),
        (wider, "actions of 5 and states of 2 numbers, most episodes of the corpus have 4 and 2"),
        (twice, "frame_index of its 16 rows is not 0 to 15"),
    ],
)
def test_unusable_actions_cost_the_episode_its_actions_and_not_its_video(
    tmp_path: Path, edit: Callable[[Rows], None], message: str
) -> None:
    edited(write_lerobot(tmp_path / "c", LENGTHS), edit)
    manifest = ingest(configured(tmp_path))
    committed = read_committed(str(tmp_path / "m"), "c")
    assert committed is not None and committed.counts == {"videos": 4}
    count, example = committed.notes["bad_actions"]
    assert count == 1 and example.startswith("episode_000001") and message in example
    plan = Plan(manifest, {"c": 1.0}, ChunkRule(3), 0)
    assert plan.num_videos == 3 and plan.excluded == {"c: bad_actions, listed by the ingest": 1}
    assert Plan(manifest, {"c": 1.0}, ClipRule(4), 0).num_videos == 4
    found = statistics(plan)
    assert found["action"].count == 50 and all(np.isfinite(found["proprio"].mean))


@pytest.mark.parametrize("how", ["absent", "cut"])
def test_a_table_of_actions_that_cannot_be_read_leaves_the_videos(tmp_path: Path, how: str) -> None:
    path = write_lerobot(tmp_path / "c", LENGTHS) / "data" / "chunk-000" / "file-000.parquet"
    kept = path.read_bytes()
    path.unlink() if how == "absent" else path.write_bytes(kept[: len(kept) // 2])
    table = ingest(configured(tmp_path)).table
    assert table["bad_actions"].to_pylist() == [True] * 4 and table["num_actions"].to_pylist() == [0] * 4
    path.write_bytes(kept)
    assert ingest(configured(tmp_path)).table["num_actions"].to_pylist() == LENGTHS


def test_training_reads_no_source_and_computes_statistics_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_lerobot(tmp_path / "c", LENGTHS)
    manifest = ingest(configured(tmp_path))
    shutil.rmtree(root / "data")
    monkeypatch.setattr(formats, "read_signals", None)
    reader = SignalReader()
    for row, (episode, length) in enumerate(enumerate(LENGTHS)):
        signals = reader.of_row(manifest, row)
        assert signals.actions[:, :2].tolist() == [[episode, t] for t in range(length)]
        assert signals.proprio is not None and signals.proprio.tolist() == [
            [t, episode] for t in range(length)
        ]
    plan = Plan(manifest, {"c": 1.0}, ChunkRule(3), 0)
    first = statistics(plan)
    monkeypatch.setattr(SignalReader, "of_row", None)
    again = statistics(plan)
    assert all(
        (getattr(first[n], f) == getattr(again[n], f)).all()
        for n in first
        for f in ("mean", "std", "min", "max")
    )
    assert first["action"].min.tolist() == [0, 0, 0, 1] and first["action"].max.tolist() == [3, 19, 0, 1]


def test_another_ingest_copies_the_signals_whose_files_have_not_changed(tmp_path: Path) -> None:
    root = write_lerobot(tmp_path / "c", LENGTHS)
    before = ingest(configured(tmp_path)).table
    spoil(root / "data" / "chunk-000" / "file-000.parquet")
    after = ingest(replace(configured(tmp_path), holdout=0.5)).table
    assert set(after["split"].to_pylist()) == {"train", "validation"}
    for column in ("signals", "signals_row", "num_actions"):
        assert after[column].to_pylist() == before[column].to_pylist()


def test_chunks_carry_the_actions_of_their_frames(tmp_path: Path) -> None:
    write_lerobot(tmp_path / "c", LENGTHS)
    manifest = ingest(configured(tmp_path))
    plan = Plan(manifest, {"c": 1.0}, ChunkRule(3), 0)
    assert dimensions(plan) == (4, 2)
    decoder = SampleDecoder(plan, configured(tmp_path))
    try:
        batch = decoder({"start": np.array([0]), "stop": np.array([20])})
    finally:
        decoder.close()
    starts = np.cumsum([0, *LENGTHS])
    for image, actions, mask in zip(batch["images"], batch["actions"], batch["action_mask"], strict=True):
        episode, t = int(actions[0, 0]), int(actions[0, 1])
        assert numbers_of(image) == [starts[episode] + t]
        assert mask.tolist() == [t + k < LENGTHS[episode] for k in range(3)]


def test_a_signal_file_gives_any_rows_across_its_batches(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths = [1, 7, BATCH_ROWS, 3 * BATCH_ROWS + 5, 2]
    parts = [(random.random((n, 3), np.float32), random.random((n, 2), np.float32)) for n in lengths]
    write_signals(tmp_path / "s.arrow", SignalLayout(3, 2, ("x", "y", "z"), ()), parts)
    file = SignalFile(str(tmp_path / "s.arrow"))
    actions, states = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    for first, count in [(0, 1), (4, 0), (BATCH_ROWS - 1, 2), (5, 2 * BATCH_ROWS), (len(actions) - 3, 3)]:
        assert (file.actions(first, count) == actions[first : first + count]).all()
        assert (file.states(first, count) == states[first : first + count]).all()
    assert file.layout.action_names == ("x", "y", "z")


def test_the_statistics_of_parts_are_those_of_the_whole(tmp_path: Path) -> None:
    write_lerobot(tmp_path / "c", LENGTHS)
    plan = Plan(ingest(configured(tmp_path)), {"c": 1.0}, ChunkRule(3), 0)
    table = pq.read_table(next((tmp_path / "c" / "data").rglob("*.parquet")))
    whole = np.array(table["action"].to_pylist(), np.float64)
    found = statistics(plan)["action"]
    assert found.mean == pytest.approx(whole.mean(axis=0), rel=1e-6)
    assert found.std == pytest.approx(whole.std(axis=0), rel=1e-6)
    assert isinstance(plan.manifest, Manifest) and found.count == len(whole)


def test_chosen_states_reach_batches_statistics_and_the_layout_for_serving(tmp_path: Path) -> None:
    write_lerobot(tmp_path / "c", LENGTHS)
    config = configured(tmp_path)
    config.corpora["c"].state = [1, {"index": 0, "angle": "sin_cos"}]
    manifest = ingest(config)
    plan, whole = (Plan.of(manifest, data, ChunkRule(3), 0) for data in (config, configured(tmp_path)))
    assert dimensions(plan) == (4, 3) and dimensions(whole) == (4, 2)
    assert plan.fingerprint() != whole.fingerprint()
    decoder = SampleDecoder(pickle.loads(pickle.dumps(plan)), config)
    try:
        batch = decoder({"start": np.array([0]), "stop": np.array([10])})
    finally:
        decoder.close()
    layout = state_layout(plan)
    assert layout is not None and layout.raw_dim == 2 and state_layout(whole) is None
    for actions, proprio in zip(batch["actions"], batch["proprio"], strict=True):
        episode, t = actions[0, :2]
        assert proprio == pytest.approx([episode, np.sin(t), np.cos(t)], abs=1e-6)
        assert (layout.apply(np.array([t, episode])) == proprio).all()
    assert statistics(plan)["proprio"].max[0] == 3 and len(statistics(whole)["proprio"].max) == 2
    config.corpora["c"].state = [2]
    with pytest.raises(ConfigError, match=r"data.corpora.c.state\[0\] is 2; the states have entries 0 to 1"):
        dimensions(Plan.of(manifest, config, ChunkRule(3), 0))


def test_corpora_with_their_entries_at_other_places_are_served_with_the_entries_alone(tmp_path: Path) -> None:
    config = configured(tmp_path)
    config.corpora = {}
    for name, places in {"a": [0, 1], "b": [1, 0, 0]}.items():
        root = write_lerobot(tmp_path / name, [6, 8])
        edited(root, lambda rows, places=places: rows.update(  # type: ignore[misc]
            {"observation.state": [[state[i] for i in places] for state in rows["observation.state"]]}
        ))  # fmt: skip
        choice = [{"index": places.index(0), "angle": "sin_cos"}, places.index(1)]
        config.corpora[name] = CorpusConfig(path=str(root), state=choice)
    plan = Plan.of(ingest(config), config, ChunkRule(3), 0)
    layout, reader = state_layout(plan), SignalReader(plan.states)
    assert layout is not None and layout.raw_dim == 2 and dimensions(plan) == (4, 3)
    for row in plan.first_rows().tolist():
        signals = reader.of_row(plan.manifest, row)
        raw = signals.actions[:, [1, 0]]  # (t, episode), which the state is, too
        assert signals.proprio is not None and (layout.apply(raw) == signals.proprio).all()


def test_calvins_roll_is_unwrapped_and_its_fifteen_numbers_cut_to_eight(
    shared_data: Path, tmp_path: Path
) -> None:
    names = ["x", "y", "z", "roll", "pitch", "yaw", "gripper_opening", "gripper_action"]
    angles = {"roll", "pitch", "yaw"}
    choice = [{"name": name, "angle": "unwrap"} if name in angles else name for name in names]
    # One camera's pictures are enough, and few of them.
    frames = tmp_path / "c" / "validation"
    (frames / "lang_annotations").mkdir(parents=True)
    source = shared_data / "calvin" / "validation"
    for path in [*source.glob("*.npz"), source / "lang_annotations" / "auto_lang_ann.npy"]:
        (frames / path.relative_to(source)).symlink_to(path)
    config = configured(tmp_path)
    config.corpora["c"].state = choice
    plan = Plan.of(ingest(config), config, ChunkRule(3), 0)
    reader, raw = SignalReader(plan.states), SignalReader()
    rows = plan.first_rows().tolist()
    jumps = {name: 0.0 for name in angles}
    for row in rows:
        found, whole = reader.of_row(plan.manifest, row).proprio, raw.of_row(plan.manifest, row).proprio
        assert found is not None and whole is not None and found.shape[1] == 8 and whole.shape[1] == 15
        assert (found[:, [0, 1, 2, 6, 7]] == whole[:, [0, 1, 2, 6, 14]]).all()
        for name in angles:
            jumps[name] = max(jumps[name], float(np.abs(np.diff(found[:, names.index(name)])).max()))
    assert max(jumps.values()) < 1.0
