"""Formats by name, and detection of the one that a corpus has."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from defi_models.errors import did_you_mean
from defi_platform import storage
from defi_platform.config import CorpusConfig
from defi_platform.data.sources import annotated, hdf5, plain, something, webdataset
from defi_platform.data.sources.calvin import segments as calvin
from defi_platform.data.sources.lerobot import v3 as lerobot
from defi_platform.data.sources.lerobot import v21 as lerobot_v21
from defi_platform.data.sources.records import Listing, Reading, SignalNames, Signals, Steps
from defi_platform.data.sources.rlds import builders as rlds
from defi_platform.errors import CorpusError, UserError

FORMATS: Final[dict[str, ModuleType]] = {
    # In the order in which they are tried: a plain folder is what no other format recognises.
    "lerobot_v3": lerobot,
    "lerobot_v21": lerobot_v21,
    "annotated": annotated,
    "calvin": calvin,
    "rlds": rlds,
    "webdataset": webdataset,
    "hdf5": hdf5,
    "something": something,
    "plain": plain,
}


def format_of(name: str, corpus: CorpusConfig) -> str:
    """Name of a corpus's format: the configured one, or the first whose `detect` recognises the folder.

    Raises: CorpusError when the folder is absent, empty or of no known format, or the format is unknown;
        StorageError when its upload was cut short.
    """
    root = corpus.path
    if corpus.format != "auto" and corpus.format not in FORMATS:
        raise CorpusError(
            f"data.corpora.{name}.format is '{corpus.format}', which is not a format."
            + did_you_mean(corpus.format, FORMATS)
        )
    if not storage.is_folder(root):
        raise CorpusError(
            f"{root} (data.corpora.{name}.path) does not exist or is no folder. Check the path, or make the corpus."
        )
    top = set(storage.names(root))
    storage.ensure_complete(root, top)
    if not top:
        raise CorpusError(f"{root} (data.corpora.{name}.path) is empty. Check the path, or fill the folder.")
    if corpus.format != "auto":
        return corpus.format
    for format_name, module in FORMATS.items():
        try:
            if module.detect(root, top):
                return format_name
        except UserError:
            raise
        except Exception as error:
            raise CorpusError(
                f"{root} cannot be read as {format_name}, for which it looks: {type(error).__name__}: {error}. "
                f"Check its metadata, or set data.corpora.{name}.format."
            ) from error
    missing = [
        part for part in ("annotation/", "meta/info.json") if part.rstrip("/").split("/")[0] not in top
    ]
    titles = ", ".join(module.TITLE for module in FORMATS.values())
    raise CorpusError(
        f"{root} has no {' and no '.join(missing or ['video'])}.\n"
        f"  Looked for: {titles}. Set data.corpora.{name}.format to choose one."
    )


def listing(format_name: str, root: str, fps: float | None) -> Listing:
    """Lists the videos that the corpus at `root` names.

    Args:
        format_name: key of `FORMATS`.
        root: folder of the corpus, local or remote.
        fps: frames per second, which wins over what the corpus says; None asks the corpus.

    Returns: an iterator of records, rejected records and signs of progress.
    """
    return (item for item in steps(format_name, root, fps) if not isinstance(item, Reading))


def steps(format_name: str, root: str, fps: float | None) -> Steps:
    """Lists as `listing` does, and says which file is read next.

    Args:
        format_name: key of `FORMATS`.
        root: folder of the corpus.
        fps: see `listing`.
    """
    try:
        module = FORMATS[format_name]
        # A format that reads nothing dangerous has no steps.
        yield from getattr(module, "steps", module.listing)(root, fps)
    except (UserError, MemoryError):
        raise
    except Exception as error:  # whatever a stranger's metadata may lead to: no source may end in a traceback
        raise CorpusError(
            f"{root} cannot be listed as {format_name}: {type(error).__name__}: {str(error)[:500]}. "
            "Check the corpus's own metadata, or set its format."
        ) from error


def read_signals(format_name: str, uri: str, episode_id: str) -> Signals:
    """Reads actions and proprioception of one episode.

    Args:
        format_name: key of `FORMATS`.
        uri: `signals_uri` of the episode's record.
        episode_id: `episode_id` of the episode's record.

    Raises: CorpusError when the file, or the episode in it, is absent or damaged.
    """
    signals: Signals = FORMATS[format_name].read_signals(uri, episode_id)
    return signals


def signal_names(format_name: str, root: str) -> SignalNames:
    """Names of the entries of a corpus's actions and states, () where its format gives none.

    Args:
        format_name: key of `FORMATS`.
        root: folder of the corpus.
    """
    names: SignalNames = getattr(FORMATS[format_name], "signal_names", lambda root: SignalNames())(root)
    return names
