"""Versions of a manifest: tables named by their content, opened by name, kept until they are pruned."""

from __future__ import annotations

import json
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from corpora import manifest_of

from defi_platform.data.ingest.probe_results import RESULT_SCHEMA
from defi_platform.data.manifest.commit_marker import prune_tables
from defi_platform.data.manifest.quarantine import QUARANTINE_SCHEMA
from defi_platform.data.manifest.table import SCHEMA, Manifest, commit_corpus
from defi_platform.data.sampling.plan import Plan
from defi_platform.data.sampling.samplers import PairRule
from defi_platform.errors import CorpusError

ROW: dict[str, Any] = {
    "camera": "main", "split": "train", "num_frames": 30, "fps": 10.0, "num_actions": 0, "first_frame": 0,
    "version": "1", "width": 64, "height": 64, "codec": "h264", "decoder": "decord", "bytes": 9, "source": "plain",
    "episode_id": "", "signals_uri": "", "variable_rate": False, "times": None,
}  # fmt: skip


def rows(corpus: str, count: int, **change: Any) -> list[dict[str, Any]]:
    """Rows of a corpus of `count` videos; `change` is made to the first."""
    found = [
        ROW | {"corpus": corpus, "video_id": f"{n:03d}", "uri": f"/{corpus}/{n}.mp4", "text": f"do {n}"}
        for n in range(count)
    ]
    return [found[0] | change, *found[1:]]


def commit(folder: Path, corpus: str, count: int, **change: Any) -> None:
    """Stores `rows` as the newest version of a corpus."""
    table = pa.Table.from_pylist(rows(corpus, count, **change), schema=SCHEMA)
    empty = (schema.empty_table().to_reader() for schema in (QUARANTINE_SCHEMA, RESULT_SCHEMA))
    commit_corpus(str(folder), corpus, table.to_reader(), *empty, {})


def plan_of(manifest: Manifest, **weights: float) -> Plan:
    """Pairs of the corpora in `weights`."""
    return Plan(manifest, weights, PairRule(interval_s=1.0), seed=0)


def columns() -> dict[str, Any]:
    """Column -> a value unlike any in `rows`."""
    kinds = {
        pa.int32(): 31,
        pa.int64(): 31,
        pa.float32(): 3.5,
        pa.bool_(): True,
        pa.binary(): b"x",
        pa.large_binary(): b"x",
    }
    found = {f.name: kinds.get(f.type, "other") for f in SCHEMA if not pa.types.is_list(f.type)}
    return {**found, "times": [0.0, 0.5]}


@pytest.mark.parametrize("column", [name for name in SCHEMA.names if name not in ("corpus", "split")])
def test_the_fingerprint_changes_with_every_column_of_a_row(column: str) -> None:
    before, after = rows("a", 3), rows("a", 3, **{column: columns()[column]})
    assert (
        plan_of(manifest_of(before), a=1.0).fingerprint() != plan_of(manifest_of(after), a=1.0).fingerprint()
    )


def test_the_fingerprint_does_not_change_with_corpora_that_are_not_drawn(tmp_path: Path) -> None:
    for corpus in ("a", "b"):
        commit(tmp_path, corpus, 5)
    drawn = {"a": 1.0, "b": 0.0}
    alone = plan_of(Manifest.open(str(tmp_path), ["a"]), a=1.0)
    beside = plan_of(Manifest.open(str(tmp_path)), **drawn)
    commit(tmp_path, "b", 9)
    beside_another = plan_of(Manifest.open(str(tmp_path), ["b", "a"]), **drawn)
    assert alone.fingerprint() == beside.fingerprint() == beside_another.fingerprint()
    samples = [
        [(s.corpus, plan.manifest.row(s.row)["video_id"], s.indices) for s in plan.resolve_many(range(60))]
        for plan in (alone, beside, beside_another)
    ]
    assert samples[0] == samples[1] == samples[2]


def test_what_was_sent_before_an_ingest_reads_the_rows_from_before_it(tmp_path: Path) -> None:
    commit(tmp_path, "a", 5)
    plan = plan_of(Manifest.open(str(tmp_path)), a=1.0)
    sent, samples = pickle.dumps(plan), plan.resolve_many(range(50))
    commit(tmp_path, "a", 40)
    restarted: Plan = pickle.loads(sent)
    assert restarted.resolve_many(range(50)) == samples and restarted.fingerprint() == plan.fingerprint()
    assert restarted.manifest.tables == plan.manifest.tables
    newest = Manifest.open(str(tmp_path))
    assert len(newest) == 40 and newest.tables != plan.manifest.tables
    assert len(Manifest.open(str(tmp_path), ["a"], plan.manifest.tables)) == 5


def test_another_version_does_not_stand_in_for_one_that_is_gone(tmp_path: Path) -> None:
    commit(tmp_path, "a", 5)
    first = Manifest.open(str(tmp_path))
    commit(tmp_path, "a", 6)
    assert prune_tables(str(tmp_path), "a", older_than_days=1.0) == []
    assert len(Manifest.open(str(tmp_path), ["a"], first.tables)) == 5
    marker = tmp_path / "corpora" / "a" / "committed.json"
    content = json.loads(marker.read_text())
    content["earlier"] = {table: time.time() - 2 * 86_400 for table in content["earlier"]}
    marker.write_text(json.dumps(content))
    assert prune_tables(str(tmp_path), "a", older_than_days=1.0) == [first.tables["a"]]
    with pytest.raises(CorpusError, match=rf"{first.tables['a']} is gone: corpus 'a'.*Restore it"):
        Manifest.open(str(tmp_path), ["a"], first.tables)
    assert len(Manifest.open(str(tmp_path))) == 6


@pytest.mark.parametrize("left", [0, 100, 1500])
def test_rows_whose_mapped_file_is_cut_are_read_from_the_other_one(tmp_path: Path, left: int) -> None:
    commit(tmp_path, "a", 5)
    mapped = next(tmp_path.rglob("*.arrow"))
    mapped.write_bytes(mapped.read_bytes()[:left])
    assert Manifest.open(str(tmp_path)).take("text", np.arange(5)) == [f"do {n}" for n in range(5)]


def test_rows_that_come_again_are_not_pruned_as_earlier_ones(tmp_path: Path) -> None:
    for count in (5, 6, 5):
        commit(tmp_path, "a", count)
    assert len(prune_tables(str(tmp_path), "a", older_than_days=-1.0)) == 1
    assert len(Manifest.open(str(tmp_path))) == 5


def test_rows_have_one_name_however_they_came(tmp_path: Path) -> None:
    commit(tmp_path, "a", 5)
    assert Manifest.open(str(tmp_path)).fingerprint() == manifest_of(rows("a", 5)).fingerprint()
    assert np.array_equal(Manifest.open(str(tmp_path)).numbers("num_frames"), np.full(5, 30))
