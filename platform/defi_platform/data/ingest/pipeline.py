"""The ingest: lists what corpora have, opens each file once in an isolated process, writes the manifest."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator
from contextlib import closing

import pyarrow as pa

from defi_platform import logs
from defi_platform.cluster import ray_session
from defi_platform.cluster.run_registry import register_run
from defi_platform.config import CorpusConfig, DataConfig, DecodeConfig, IngestConfig
from defi_platform.config.data import drawn_corpora
from defi_platform.config.data_checks import check_data
from defi_platform.config.loader import to_mapping
from defi_platform.config.paths import absolute_paths
from defi_platform.data.decode.pool import DecoderPool
from defi_platform.data.ingest.listing import listed
from defi_platform.data.ingest.manifest_rows import rows_of
from defi_platform.data.ingest.probe_actors import one_process, probe_files
from defi_platform.data.ingest.probe_results import LIMITS, ResultBlocks
from defi_platform.data.ingest.quality_filters import needs_scores
from defi_platform.data.ingest.signal_stage import SignalStage
from defi_platform.data.ingest.store import VideoStore
from defi_platform.data.ingest.summary import ingest_table
from defi_platform.data.manifest.commit_marker import Committed, corpus_folder, prune_tables
from defi_platform.data.manifest.notes import warnings
from defi_platform.data.manifest.project_split import ProjectSplit
from defi_platform.data.manifest.quarantine import forget_quarantined, read_quarantined_later, strict_error
from defi_platform.data.manifest.table import Corpus, Manifest, commit_corpus, read_corpus
from defi_platform.data.rejection import TRANSIENT_REASON
from defi_platform.data.sources import formats
from defi_platform.data.sources.records import ListingProgress
from defi_platform.errors import CorpusError, UserError
from defi_platform.metrics import catalogue
from defi_platform.progress import Progress
from defi_platform.storage.scratch import scratch


def run_ingest(config: IngestConfig) -> str:
    """Brings the manifest up to date on Ray. Returns: the table of its corpora. Raises: see `ingest`."""
    check_data(config.data)
    names = list(drawn_corpora(config.data))
    print(f"ingest: {len(names)} corpora into {config.data.manifest}", flush=True)
    with ray_session(config.ray):
        register_run(config.data.manifest)
        ingest(config.data)
    if config.prune_days is not None:
        for name in names:
            gone = prune_tables(config.data.manifest, name, config.prune_days)
            logs.say(f"ingest: {name}: {len(gone)} earlier versions deleted", corpus=name)
    return ingest_table(config.data.manifest, names)


def ingest(config: DataConfig) -> Manifest:
    """Brings the manifest up to date with the corpora and opens it.

    Corpora whose files and settings are what they were at the last ingest are reused, unopened. An ingest that was
    killed is resumed, but for the blocks of files that were open.

    Raises: CorpusError when a corpus is absent, empty, of no known format or without a usable video, and with
    `strict` at the first bad video. StorageError when a store is down or refuses.
    """
    if not config.corpora:
        raise CorpusError("data.corpora is empty. Name at least one corpus: data.corpora.NAME.path=FOLDER")
    check_data(config)
    # Probing actors run in other working directories than the driver.
    config = absolute_paths(config)
    config = dataclasses.replace(config, corpora=drawn_corpora(config))
    format_names = _formats(config)
    reused = []
    with one_process(config.decode) as pool:
        for name, corpus in config.corpora.items():
            started = time.monotonic()
            fresh, committed = _ingest_corpus(name, corpus, format_names[name], config, pool)
            counts = committed.counts
            if fresh:
                for result, number in counts.items():
                    result = "usable" if result == "videos" else result
                    catalogue.INGEST_VIDEOS.add(number, corpus=name, result=result)
            else:
                reused.append(name)
            rejected = {k: n for k, n in counts.items() if k != "videos"}
            logs.say(
                f"ingest: {name}: {counts['videos']} videos"
                + (f", rejected {rejected}" if rejected else "")
                + (f" in {time.monotonic() - started:.1f} s" if fresh else "; unchanged, manifest reused"),
                corpus=name,
                counts=counts,
            )
            for line in warnings(name, committed.notes):
                logs.say(f"ingest: {line}", corpus=name)
            if not counts["videos"]:
                why = ", ".join(f"{n} {reason}" for reason, n in rejected.items())
                raise CorpusError(
                    f"{corpus.path} (data.corpora.{name}) holds no usable video: {why}. "
                    f"The quarantine table in {config.manifest} says why for each."
                )
    manifest = Manifest.open(config.manifest, list(config.corpora))
    manifest.reused = tuple(reused)
    return manifest


def _formats(config: DataConfig) -> dict[str, str]:
    """Finds the format of every corpus: what is wrong with any is said before hours go into the first."""
    found, errors = {}, []
    for name, corpus in config.corpora.items():
        try:
            found[name] = formats.format_of(name, corpus)
        except UserError as error:
            errors.append(error)
    if len(errors) > 1:
        raise CorpusError(f"{len(errors)} corpora cannot be read:\n" + "\n".join(f"- {e}" for e in errors))
    if errors:
        raise errors[0]
    return found


def _ingest_corpus(
    name: str, corpus: CorpusConfig, format_name: str, config: DataConfig, pool: DecoderPool
) -> tuple[bool, Committed]:
    """Returns: whether anything had to be written, and what is committed of the corpus."""
    root = corpus.path
    screen = needs_scores(corpus.filters) or corpus.windows.mode == "shots"
    with (
        scratch("signals") as folder,
        closing(VideoStore(name, screen, config.strict, config.decode)) as store,
        closing(SignalStage(folder, format_name, formats.signal_names(format_name, root))) as signals,
    ):
        _list(store, name, corpus, format_name, root, pool)
        settings = {
            "path": root,
            "format": format_name,
            "holdout": config.holdout,
            "fps": corpus.fps,
            "windows": to_mapping(corpus.windows),
            "filters": to_mapping(corpus.filters),
            "listing": store.fingerprint(),
        }
        project = ProjectSplit(config.split) if config.split else None
        if project is not None:
            settings["split"] = project.identity()
        blocks = ResultBlocks(corpus_folder(config.manifest, name))
        before = read_corpus(config.manifest, name)
        if (
            before is not None
            and before.committed.settings == settings
            and not before.committed.counts.get(TRANSIENT_REASON)
            and not _limit_raised(before, config.decode)
            and not (config.retry_quarantined and any(t.num_rows for t in _rejected(config, name, before)))
        ):
            for table in before.rejected() if config.strict else ():
                for first in table.slice(0, 1).to_pylist():
                    raise strict_error(first)
            blocks.delete()
            return False, before.committed
        _probe(store, name, before, blocks, config, pool)
        with_signals = _read_signals(signals, store, name, before, config, pool)
        for record, result in store.probed():
            for row, signature in rows_of(name, corpus, format_name, record, result, signals):
                if "reason" in row:
                    store.reject(row)
                else:
                    store.accept(row, signature)
        if corpus.filters.duplicate_bits is not None:
            store.reject_duplicates(corpus.filters.duplicate_bits)
        for note in signals.notes():
            store.note(note)
        if signals.unread:
            settings["unread_signals"] = signals.unread  # so that the next ingest asks for them again
        videos, rejected, opened = store.accepted(config.holdout, project), store.rejected(), store.results()
        if project is not None:
            settings["split"] = project.identity()  # the first ingest has made it
        committed = commit_corpus(
            config.manifest,
            name,
            videos,
            rejected,
            opened,
            settings,
            noted=store.noted(),
            signals=(signals.table, signals.index()) if with_signals else None,
        )
        blocks.delete()
    if config.retry_quarantined:
        forget_quarantined(config.manifest, name)
    return True, committed


def _list(
    store: VideoStore, name: str, corpus: CorpusConfig, format_name: str, root: str, pool: DecoderPool
) -> None:
    publish = functools.partial(catalogue.INGEST_LISTED.add, corpus=name)
    with Progress(f"ingest: {name}: listing", "videos", publish=publish, corpus=name) as progress:
        for item in listed(pool, format_name, root, corpus.fps):
            if isinstance(item, ListingProgress):
                progress.step(0, f"{item.files:,} files seen")
            else:
                store.add(item)
                progress.step()
    if not len(store):
        raise CorpusError(
            f"{corpus.path} (data.corpora.{name}.path) lists no video, read as {format_name}. "
            "Check the path, or set the format of this corpus."
        )


def _probe(
    store: VideoStore,
    name: str,
    before: Corpus | None,
    blocks: ResultBlocks,
    config: DataConfig,
    pool: DecoderPool,
) -> None:
    """Gives every file its result; those that were opened before in this version are not opened again."""
    store.load_committed(before.opened() if before is not None else ())
    store.reject_repeated()
    for rejected in _rejected(config, name, before) if config.retry_quarantined else ():
        store.invalidate(rejected)
    resumed = any([store.load_partial(block) for block in blocks.read()])
    count, requests = store.todo()
    if resumed and count < (files := store.num_files()):
        logs.say(f"ingest: {name}: goes on, {count} of {files} files left to open", corpus=name)
    bad = 0
    publish = functools.partial(catalogue.INGEST_OPENED.add, corpus=name)
    with Progress(f"ingest: {name}: opened", "files", count, publish=publish, corpus=name) as progress:
        folder = corpus_folder(config.manifest, name)
        answered = store.any_probed()
        for result in probe_files(requests, count, config.decode, folder, answered, pool):
            bad += result.bad is not None
            progress.step(note=f"{bad} bad" if bad else "")
            store.add_result(result)


def _read_signals(
    signals: SignalStage,
    store: VideoStore,
    name: str,
    before: Corpus | None,
    config: DataConfig,
    pool: DecoderPool,
) -> bool:
    """Reads the signals of every episode that has some. Returns: whether there is one."""
    episodes = store.episodes_with_actions()
    first = next(episodes, None)
    if first is None:
        return False
    with Progress(f"ingest: {name}: actions read", "episodes", corpus=name) as progress:
        for done in signals.read(itertools.chain([first], episodes), before, config.decode, pool):
            progress.step(done)
    signals.write(corpus_folder(config.manifest, name))
    return True


def _limit_raised(before: Corpus, limits: DecodeConfig) -> bool:
    """Returns whether a file went beyond a limit that is higher now."""
    if not any(before.committed.counts.get(reason) for reason in LIMITS):
        return False
    return any(
        limit is not None and limit < float(LIMITS[reason](limits))
        for table in before.opened()
        for reason, limit in zip(*(table.column(n).to_pylist() for n in ("reason", "limit")), strict=True)
    )


def _rejected(config: DataConfig, name: str, before: Corpus | None) -> Iterator[pa.Table]:
    """Yields everything in quarantine, from the ingest or later."""
    if before is not None:
        yield from before.rejected()
    yield read_quarantined_later(config.manifest, name)
