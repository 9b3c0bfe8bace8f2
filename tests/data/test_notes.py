"""What an ingest counts besides videos and rejections: kept in the commit, shown in the table, warned of by example."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import write_video
from test_ingest import configured

from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.ingest import pipeline
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.ingest.summary import ingest_table
from defi_platform.data.manifest.table import read_corpus
from defi_platform.data.sources import formats
from defi_platform.data.sources.records import Listing, Note


def test_notes_of_a_listing_are_counted_listed_and_warned_of_by_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        write_video(tmp_path / "c" / f"{name}.mp4", range(10))

    def with_notes(pool: DecoderPool, source: str, root: str, fps: float | None) -> Listing:
        yield from formats.listing(source, root, fps)
        for number in range(3):
            yield Note(kind="bad_actions", item=f"e{number}", uri="x", message="a NaN in row 4")

    monkeypatch.setattr(pipeline, "listed", with_notes)
    folder = str(tmp_path / "m")
    for _ in range(2):  # fresh, then reused
        ingest(configured(tmp_path / "c", tmp_path / "m"))
        output = capsys.readouterr().out
        assert (
            "warning: c: 3 bad_actions (usable, but for its actions or states), such as e0: a NaN" in output
        )
        assert "warning: c: 2 no_text" in output and "such as a.mp4" in output
    corpus = read_corpus(folder, "c")
    assert corpus is not None
    assert {kind: n for kind, (n, _) in corpus.committed.notes.items()} == {"bad_actions": 3, "no_text": 2}
    assert [row["item"] for table in corpus.noted() for row in table.to_pylist()] == ["e0", "e1", "e2"]
    table = ingest_table(folder, ["c"]).splitlines()
    assert table[1].split()[:6] == ["c", "plain", "2", "0.001", "3", "bad_actions"]
    assert table[2].split()[:2] == ["2", "no_text"] and table[3].startswith("warning: c: 3 bad_actions")
