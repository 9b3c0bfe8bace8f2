"""The split of a whole project, kept by episode id: what one training holds out, no other training of it learns from.

    <folder>/episodes-000000.parquet, episodes-000001.parquet, ...   never changed; each ingest adds what is new to it

An episode is known again by its id within a corpus of the same name, and by its pictures in any corpus. Corpora may so be
parts of each other, and `data.holdout` differ: it decides on episodes that are new alone. Where trainings disagree (an
episode that one of them held out is a copy of what another has trained on), it trains.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from defi_platform import logs, storage
from defi_platform.data.manifest.split import held_out, joined
from defi_platform.data.tables.parquet_io import encoded, read_table
from defi_platform.errors import CorpusError
from defi_platform.storage.exclusive import create_bytes

SCHEMA = pa.schema(
    [
        ("corpus", pa.dictionary(pa.int16(), pa.string())),
        ("episode", pa.uint64()),
        ("content", pa.uint64()),
        ("held_out", pa.bool_()),
    ]
)
"""`episode`: `hash_position` of the id that a source gives what belongs together; `content`: of its pictures, 0: not known."""


class ProjectSplit:
    """The folder `data.split`.

    Args:
        folder: local, s3:// or any fsspec URL; made by the first ingest that names it.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def identity(self) -> str:
        """A hash that is another one for a split that was begun anew in this folder; "" before its first episodes."""
        try:
            return hashlib.sha256(storage.read_bytes(self._file(0))).hexdigest()[:16]
        except FileNotFoundError:
            return ""

    def decide(
        self,
        corpus: str,
        positions: np.ndarray,
        contents: np.ndarray,
        holdout: float,
        named: np.ndarray | None = None,
    ) -> np.ndarray:
        """The videos of a corpus that are held out, all of which the project knows from here on.

        Args:
            corpus: its name.
            positions: uint64 (videos,), the `hash_position` of each one's group.
            contents: uint64 (videos,), equal for copies; 0: not known.
            holdout: share of the episodes that nobody has decided on, see `held_out`.
            named: bool (videos,), where the source itself names what is held out, which is only noted; None: it does not.

        Returns: bool (videos,).
        Raises: StorageError; CorpusError for a damaged file.
        """
        while True:
            files, known = self._read()
            held = _decided(known, corpus, positions, contents, holdout) if named is None else named
            new = _unknown(known, corpus, positions, contents, held)
            own = int(pc.sum(pc.equal(known["corpus"], corpus)).as_py() or 0)
            if new.num_rows and not create_bytes(self._file(files), encoded(new)):
                continue  # another ingest was first: what it has decided counts
            logs.say(
                f"ingest: {corpus}: the project's split {self._folder} holds out {int(held.sum()):,} of {len(held):,} "
                f"videos; {new.num_rows:,} entries are new, {own:,} were there",
                corpus=corpus,
            )
            return held

    def held(self, corpus: str, positions: np.ndarray) -> np.ndarray:
        """Videos of a corpus that trainings of the project have held out and none has learned from.

        Args:
            corpus: its name in them.
            positions: uint64 (videos,), the `hash_position` of each one's group.

        Returns: bool (videos,).
        Raises: CorpusError when they had no such corpus.
        """
        _, known = self._read()
        names = pc.unique(known["corpus"]).to_pylist()
        if corpus not in names:
            raise CorpusError(
                f"the project's split {self._folder} knows no corpus '{corpus}'. It has: {', '.join(sorted(names)) or 'none'}."
            )
        own, out, seen = _sides(known, corpus)
        episode = known["episode"].to_numpy()
        return np.isin(positions, episode[own & out]) & ~np.isin(positions, episode[own & seen])

    def corpora(self) -> set[str]:
        """Names of the corpora that it knows."""
        return set(pc.unique(self._read()[1]["corpus"]).to_pylist())

    def trained_too(self, corpora: Iterable[str]) -> int:
        """Number of episodes of these corpora that are held out although some training has learned from them.

        So it is with a corpus that names its validation itself, and where a later corpus has made copies of one held out
        and one trained on belong together.
        """
        _, known = self._read()
        count = 0
        for corpus in corpora:
            own, out, seen = _sides(known, corpus)
            count += len(np.unique(known["episode"].to_numpy()[own & out & seen]))
        return count

    def _file(self, number: int) -> str:
        return storage.join(self._folder, f"episodes-{number:06d}.parquet")

    def _read(self) -> tuple[int, pa.Table]:
        """(number of files, their rows)."""
        names = [name for name in storage.names(self._folder) if name.startswith("episodes-")]
        parts = [read_table(self._file(number)).cast(SCHEMA) for number in range(len(names))]
        return len(names), pa.concat_tables([SCHEMA.empty_table(), *parts]).unify_dictionaries()


def _sides(known: pa.Table, corpus: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row whether it is the corpus's, is held out, and is of an episode or of pictures that some training learned from.

    Returns: three of bool (rows,).
    """
    own = pc.equal(known["corpus"], corpus).to_numpy().astype(bool)
    out = known["held_out"].to_numpy().astype(bool)
    content, episode = known["content"].to_numpy(), known["episode"].to_numpy()
    return own, out, (content != 0) & np.isin(content, content[~out]) | np.isin(episode, episode[own & ~out])


def _decided(
    known: pa.Table, corpus: str, positions: np.ndarray, contents: np.ndarray, holdout: float
) -> np.ndarray:
    """Sides of the videos, bool (videos,): as the project has decided on any of the videos that hang together, else by the hash."""
    groups = joined(positions, contents)
    components, component = np.unique(groups, return_inverse=True)
    component = component.reshape(-1)
    out = known["held_out"].to_numpy().astype(bool)
    own = pc.equal(known["corpus"], corpus).to_numpy().astype(bool)
    episodes, pictures = known["episode"].to_numpy(), known["content"].to_numpy()
    sides = {}
    for side, chosen in (("train", ~out), ("held", out)):
        seen = np.isin(positions, episodes[own & chosen])
        seen |= np.isin(contents, pictures[chosen]) & (contents != 0)
        sides[side] = np.bincount(component[seen], minlength=len(components)) > 0
    held = sides["held"] & ~sides["train"]
    new = ~(sides["train"] | sides["held"])
    # Both splits get an episode as soon as there are two: but only where the corpus has none held out by now.
    held[new] = components[new] / 2.0**64 < holdout if held.any() else held_out(components[new], holdout)
    return np.asarray(held[component])


def _unknown(
    known: pa.Table, corpus: str, positions: np.ndarray, contents: np.ndarray, held: np.ndarray
) -> pa.Table:
    """Rows of `SCHEMA` for the pairs of episode and pictures that the project does not know yet on this side."""
    own = known.filter(pc.equal(known["corpus"], corpus))
    pairs = _pairs(positions, contents, held)
    there = _pairs(own["episode"].to_numpy(), own["content"].to_numpy(), own["held_out"].to_numpy())
    new = np.flatnonzero(~np.isin(pairs, there))
    new = new[np.unique(pairs[new], return_index=True)[1]]
    return pa.table(
        {
            "corpus": pa.array([corpus] * len(new), pa.string()).cast(SCHEMA.field("corpus").type),
            "episode": positions[new],
            "content": contents[new],
            "held_out": held[new],
        },
        schema=SCHEMA,
    )


def _pairs(positions: np.ndarray, contents: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Each video's episode, pictures and side as one value that can be compared."""
    pairs = np.empty(len(positions), [("episode", np.uint64), ("content", np.uint64), ("held", np.bool_)])
    pairs["episode"], pairs["content"], pairs["held"] = positions, contents, held
    return pairs
