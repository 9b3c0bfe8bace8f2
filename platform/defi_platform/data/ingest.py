"""From corpora to manifest: list what there is, open each file once in an isolated process, write the tables."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from defi_platform import storage
from defi_platform.cluster import ray_session
from defi_platform.config import CorpusConfig, DataConfig, IngestConfig
from defi_platform.config_file import to_mapping
from defi_platform.data.claimed_rows import Rows, rejection, rows_of
from defi_platform.data.corpus_tables import CorpusTables
from defi_platform.data.filters import needs_scores
from defi_platform.data.ingest_table import ingest_table
from defi_platform.data.manifest import Corpus, Manifest, commit_corpus, corpus_folder, read_corpus
from defi_platform.data.probing import Opening, probe_files
from defi_platform.data.progress import Progress
from defi_platform.data.quarantine import forget_quarantined, read_quarantined_later, strict_error
from defi_platform.data.reasons import BadVideo
from defi_platform.data.sources import formats
from defi_platform.data.sources.rows import Claim, Refused, Seen
from defi_platform.data.verdicts import Blocks, Verdict, table_of, verdicts_of
from defi_platform.data.windows import check_windows
from defi_platform.errors import CorpusError, UserError

ALWAYS_AGAIN = "storage"
"""The one reason that says nothing of the file: such videos are opened again by every ingest."""

FileKey = tuple[str, str]
"""(uri, version)"""


def run_ingest(config: IngestConfig) -> str:
    """Brings the manifest up to date on Ray. Returns: the table of what there is. Raises: see `ingest`."""
    print(f"ingest: {len(config.data.corpora)} corpora into {config.data.manifest}", flush=True)
    with ray_session(config.ray):
        ingest(config.data)
    return ingest_table(config.data.manifest, list(config.data.corpora))


def ingest(config: DataConfig) -> Manifest:
    """Brings the manifest up to date with the corpora and opens it.

    Corpora whose files and settings are what they were at the last ingest are reused, unopened. An ingest that was
    killed goes on where it was, but for the blocks of files that were open.

    Raises: CorpusError when a corpus is absent, empty, of no known format or without a usable video, and with
    `strict` at the first bad video. StorageError when a store is down or refuses.
    """
    if not config.corpora:
        raise CorpusError("data.corpora is empty. Name at least one corpus: data.corpora.NAME.path=FOLDER")
    # Probing actors have working directories of their own.
    config = dataclasses.replace(config, manifest=storage.absolute(config.manifest))
    format_names = _formats(config)
    reused = []
    for name, corpus in config.corpora.items():
        started = time.monotonic()
        fresh, counts = _ingest_corpus(name, corpus, format_names[name], config)
        if not fresh:
            reused.append(name)
        rejected = {k: n for k, n in counts.items() if k != "videos"}
        print(
            f"ingest: {name}: {counts['videos']} videos"
            + (f", rejected {rejected}" if rejected else "")
            + (f" in {time.monotonic() - started:.1f} s" if fresh else "; unchanged, manifest reused"),
            flush=True,
        )
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
    """Format of every corpus: what is wrong with any of them is said before hours go into the first."""
    found, errors = {}, []
    for name, corpus in config.corpora.items():
        try:
            check_windows(corpus.windows, f"data.corpora.{name}.windows")
            found[name] = formats.format_of(name, corpus)
        except UserError as error:
            errors.append(error)
    if len(errors) > 1:
        raise CorpusError(f"{len(errors)} corpora cannot be read:\n" + "\n".join(f"- {e}" for e in errors))
    if errors:
        raise errors[0]
    return found


@dataclass
class _Listed:
    """What a corpus says it has."""

    claims: list[Claim] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)

    def fingerprint(self) -> str:
        """Of what is listed, in whatever order: a sum of hashes, since millions of texts need not be sorted."""
        total = 0
        for item in itertools.chain(self.claims, self.refused):
            total += int.from_bytes(hashlib.sha256(repr(item).encode()).digest()[:16], "big")
        return f"{total % (1 << 128):032x}"


def _ingest_corpus(
    name: str, corpus: CorpusConfig, format_name: str, config: DataConfig
) -> tuple[bool, dict[str, int]]:
    """Returns: whether anything had to be written, and the counts of the corpus."""
    root = storage.absolute(corpus.path)
    listed = _list(name, corpus, format_name, root)
    settings = {
        "path": root,
        "format": format_name,
        "holdout": config.holdout,
        "fps": corpus.fps,
        "windows": to_mapping(corpus.windows),
        "filters": to_mapping(corpus.filters),
        "listing": listed.fingerprint(),
    }
    blocks = Blocks(corpus_folder(config.manifest, name))
    before = read_corpus(config.manifest, name)
    reopened = _reopened(config, name, before) if config.retry_quarantined else {}
    if (
        before is not None
        and before.committed.settings == settings
        and not before.committed.counts.get(ALWAYS_AGAIN)
        and not reopened
    ):
        _stop_if_strict(config, before.rejected().to_pylist() if config.strict else [])
        blocks.delete()
        return False, before.committed.counts
    _stop_if_strict(config, [_refusal(name, item) for item in listed.refused])
    verdicts = _verdicts(name, listed.claims, before, reopened, blocks, config)
    tables = CorpusTables()
    tables.add(Rows(rejected=[_refusal(name, item) for item in listed.refused]))
    for rows in rows_of(name, corpus, format_name, listed.claims, verdicts):
        _stop_if_strict(config, rows.rejected)
        tables.add(rows)
    videos, rejected = tables.finished(config.holdout, corpus.filters.duplicate_bits)
    committed = commit_corpus(config.manifest, name, videos, rejected, table_of(verdicts.values()), settings)
    blocks.delete()
    if config.retry_quarantined:
        forget_quarantined(config.manifest, name)
    return True, committed.counts


def _list(name: str, corpus: CorpusConfig, format_name: str, root: str) -> _Listed:
    listed = _Listed()
    with Progress(f"ingest: {name}: listing", "videos") as progress:
        for item in formats.listing(format_name, root, corpus.fps):
            if isinstance(item, Seen):
                progress.step(0, f"{item.files:,} files seen")
            elif isinstance(item, Claim):
                listed.claims.append(item)
                progress.step()
            else:
                listed.refused.append(item)
                progress.step()
    if not listed.claims and not listed.refused:
        raise CorpusError(
            f"{corpus.path} (data.corpora.{name}.path) lists no video, read as {format_name}. "
            "Check the path, or set the format of this corpus."
        )
    return listed


def _refusal(name: str, item: Refused) -> dict[str, object]:
    return rejection(name, item, BadVideo(item.reason, item.message), attempts=1)


def _stop_if_strict(config: DataConfig, rejections: Iterable[dict[str, object]]) -> None:
    for first in rejections if config.strict else ():
        raise strict_error(first)


# --------------------------------------------------------------------------- verdicts


def _verdicts(
    name: str,
    claims: Sequence[Claim],
    before: Corpus | None,
    reopened: dict[FileKey, int],
    blocks: Blocks,
    config: DataConfig,
) -> dict[str, Verdict]:
    """Uri -> what its file is; files that were judged before in this version are not opened again."""
    versions = {claim.uri: claim.version for claim in claims}
    known: dict[FileKey, Verdict] = {}
    if before is not None:
        known = {(v.uri, v.version): v for v in verdicts_of(before.opened())}
    attempts = {key: verdict.attempts for key, verdict in known.items() if verdict.bad} | reopened
    screen = _needs_screening(config.corpora[name])
    for key in [k for k, v in known.items() if k in reopened or _again(v) or (screen and not v.screened)]:
        del known[key]
    # What an ingest that was killed has judged is newer than the last commit.
    kept = {(v.uri, v.version): v for v in blocks.read() if v.screened or not screen}
    known |= {key: v for key, v in kept.items() if v.attempts > attempts.get(key, 0)}
    verdicts = {uri: known[uri, v] for uri, v in versions.items() if (uri, v) in known}
    todo = [
        Opening(uri, versions[uri], attempts.get((uri, versions[uri]), 0) + 1, screen)
        for uri in sorted(versions)
        if uri not in verdicts
    ]
    if kept and len(todo) < len(versions):
        print(f"ingest: {name}: goes on, {len(todo)} of {len(versions)} files left to open", flush=True)
    bad = 0
    with Progress(f"ingest: {name}: opened", "files", len(todo)) as progress:
        folder = corpus_folder(config.manifest, name)
        for verdict in probe_files(todo, config.decode, folder, answered=bool(verdicts)):
            verdicts[verdict.uri] = verdict
            bad += verdict.bad is not None
            progress.step(note=f"{bad} bad" if bad else "")
            if verdict.bad is not None and config.strict:
                claim = next(claim for claim in claims if claim.uri == verdict.uri)
                _stop_if_strict(config, [rejection(name, claim, verdict.bad, verdict.attempts)])
    return verdicts


def _needs_screening(corpus: CorpusConfig) -> bool:
    return needs_scores(corpus.filters) or corpus.windows.mode == "shots"


def _again(verdict: Verdict) -> bool:
    return verdict.bad is not None and verdict.bad.reason == ALWAYS_AGAIN


def _reopened(config: DataConfig, name: str, before: Corpus | None) -> dict[FileKey, int]:
    """(uri, version) of everything in quarantine, at ingest or later -> how often it was tried."""
    rows = [] if before is None else before.rejected().to_pylist()
    rows += read_quarantined_later(config.manifest, name).to_pylist()
    tried: dict[FileKey, int] = {}
    for row in rows:
        key = row["uri"], row["version"]
        tried[key] = max(tried.get(key, 0), row["attempts"])
    return tried
