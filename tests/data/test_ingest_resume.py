"""An ingest that ends anywhere: the next one opens only what no block or commit holds, and writes the same tables."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import spoil, write_video
from ray import exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError
from test_ingest import configured

from defi_platform import roles, storage
from defi_platform.cluster import actors
from defi_platform.config import DataConfig
from defi_platform.data.ingest import probe_actors
from defi_platform.data.ingest.pipeline import ingest
from defi_platform.data.ingest.probe_actors import Prober, ProbeRequest
from defi_platform.data.ingest.probe_results import ProbeResult
from defi_platform.data.ingest.store import VideoStore
from defi_platform.data.manifest.quarantine import read_quarantine
from defi_platform.data.manifest.table import Manifest
from defi_platform.errors import TRY_AGAIN, UserError

NAMES = [f"{letter}.mp4" for letter in "abcde"]


class Killed(BaseException):
    """Stands for a signal: nothing in the product catches it."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four good videos and a bad one."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, name in enumerate(NAMES[:-1]):
        write_video(folder / name, range(number, 20))
    (folder / NAMES[-1]).write_bytes(b"no video at all")
    return folder


@pytest.fixture
def config(prepared: Path, tmp_path: Path) -> DataConfig:
    shutil.copytree(prepared, tmp_path / "c")
    return configured(tmp_path / "c", tmp_path / "m", holdout=0.3)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are opened, as they are."""
    names: list[str] = []
    probe = Prober.probe

    def noted(self: Prober, block: list[ProbeRequest]) -> list[ProbeResult]:
        names.extend(Path(request.uri).name for request in block)
        return probe(self, block)

    monkeypatch.setattr(Prober, "probe", noted)
    return names


def dies_at(call: int, function: Callable[..., object]) -> Callable[..., object]:
    """`function`, but for the process that ends at its `call`-th call."""
    calls: list[None] = []

    def dying(*arguments: object, **options: object) -> object:
        calls.append(None)
        if len(calls) == call:
            raise Killed
        return function(*arguments, **options)

    return dying


@pytest.mark.parametrize(
    ("owner", "name", "call", "left"),
    [
        (VideoStore, "add", 3, NAMES),
        (Prober, "probe", 1, NAMES),
        (Prober, "probe", 4, NAMES[3:]),
        (VideoStore, "add_result", 2, NAMES[2:]),
        (VideoStore, "accept", 2, []),
        (storage, "put_file", 1, []),
        (storage, "put_file", 3, []),
        (storage, "write_text", 1, []),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_an_ingest_that_ends_anywhere_is_resumed_and_opens_only_what_was_not_stored(
    config: DataConfig,
    opened: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    owner: object,
    name: str,
    call: int,
    left: list[str],
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, dies_at(call, getattr(owner, name)))
        ingest(config)
    assert not (tmp_path / "m" / "corpora" / "c" / "committed.json").exists()
    opened.clear()
    resumed = ingest(config)
    assert opened == left
    whole = DataConfig(corpora=config.corpora, manifest=str(tmp_path / "whole"), holdout=0.3)
    assert resumed.table == ingest(whole).table
    assert read_quarantine(config.manifest) == read_quarantine(whole.manifest)
    assert not (tmp_path / "m" / "corpora" / "c" / "probed").exists()


def test_an_ingest_that_ends_after_its_commit_leaves_blocks_that_the_next_one_drops(
    config: DataConfig, opened: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(storage, "delete", dies_at(1, storage.delete))
        ingest(config)
    blocks = tmp_path / "m" / "corpora" / "c" / "probed"
    assert len(list(blocks.iterdir())) == len(NAMES)
    opened.clear()
    assert ingest(config).reused == ("c",) and opened == [] and not blocks.exists()


def test_blocks_that_are_damaged_or_of_another_layout_are_not_trusted(
    config: DataConfig, opened: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(VideoStore, "accept", dies_at(1, VideoStore.accept))
        ingest(config)
    content = {}
    for block in (tmp_path / "m" / "corpora" / "c" / "probed").iterdir():
        content[Path(pq.read_table(block).column("uri")[0].as_py()).name] = block
    content["a.mp4"].write_bytes(content["a.mp4"].read_bytes()[:-20])
    content["b.mp4"].write_bytes(b"")
    other = pq.read_table(content["c.mp4"])
    pq.write_table(other.append_column("more", pa.array([1])), content["c.mp4"])
    spoil(tmp_path / "c" / "d.mp4")  # good in its block, so nobody looks
    opened.clear()
    manifest = ingest(config)
    assert opened == ["a.mp4", "b.mp4", "c.mp4"]
    assert manifest.table.column("video_id").to_pylist() == NAMES[:-1]
    assert capsys.readouterr().out.count("is damaged") == 2


def test_two_ingests_of_one_corpus_at_once_leave_the_tables_of_either(
    config: DataConfig, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, others = VideoStore.accept, []

    def meanwhile(self: VideoStore, *arguments: object) -> None:
        if not others:
            others.append(None)
            others[0] = ingest(config).table  # type: ignore[call-overload]
        accept(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(VideoStore, "accept", meanwhile)
    assert ingest(config).table == others[0] == Manifest.open(config.manifest).table
    assert opened == NAMES
    assert ingest(config).reused == ("c",)


def test_a_file_of_another_version_is_opened_again_and_its_old_result_dropped(
    config: DataConfig, opened: list[str], tmp_path: Path
) -> None:
    ingest(config)
    write_video(tmp_path / "c" / "b.mp4", range(33))
    opened.clear()
    rows = ingest(config).table.to_pylist()
    assert opened == ["b.mp4"] and {row["video_id"]: row["num_frames"] for row in rows}["b.mp4"] == 33
    (results,) = (tmp_path / "m" / "corpora" / "c").glob("opened-*.parquet")
    assert pq.read_table(results).num_rows == len(NAMES)


def test_actors_that_die_again_and_again_are_worth_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    class LostPool:
        def __init__(self, actors: list[object]):
            self.has_free, self.has_next = (lambda: True), (lambda: True)

        def submit(self, call: object, block: list[int]) -> None:
            pass

        def get_next_unordered(self) -> None:
            raise ActorDiedError(
                ActorDiedErrorContext(actor_id=bytes(16), error_message="No module named 'defi_platform'")
            )

    killed: list[object] = []
    remote = SimpleNamespace(remote=lambda *arguments: "actor")
    local = SimpleNamespace(
        remote=lambda **options: lambda actor: remote,
        util=SimpleNamespace(ActorPool=LostPool),
        exceptions=exceptions,
        kill=killed.append,
    )
    monkeypatch.setattr(probe_actors, "ray", local)
    monkeypatch.setattr(actors, "ray", local)
    monkeypatch.setattr(probe_actors, "ray_session", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(roles, "capacity", lambda role, resource: 1.0)
    with pytest.raises(UserError, match=r"died again and again: .*No module named .defi_platform.") as caught:
        list(probe_actors.on_actors(Prober, (), range(20), 20))
    assert caught.value.exit_code == TRY_AGAIN
    assert killed == ["actor"]
