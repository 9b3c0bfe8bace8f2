"""URIs of video inside a larger file or folder, as the manifest stores them: a path, then `#kind=where`.

shard.tar#range=1536,204800                 a file inside an uncompressed tar: offset and length in bytes
x.tfrecord-00000-of-00001#rlds=0,139000,image_0     an RLDS episode: offset and length of its record, camera
calvin/training#calvin=1000,1035,rgb_static         CALVIN frames: first and last (inclusive), camera
episode_3.hdf5#hdf5=front                   an HDF5 episode: camera
a#range=0,1.mp4#file=                       a file whose own name looks like one of the above
"""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass

_PATTERN = re.compile(r"(?P<path>.*)#(?P<kind>file|range|rlds|calvin|hdf5)=(?P<where>[^#]*)", re.DOTALL)


@dataclass(frozen=True)
class VideoUri:
    """A parsed `uri`."""

    path: str
    kind: str = "file"
    """file | range | rlds | calvin | hdf5"""
    where: tuple[str, ...] = ()
    """Position inside `path`, as that kind gives it."""

    @property
    def span(self) -> tuple[int, int]:
        """The two numbers that `range`, `rlds` and `calvin` start with."""
        return int(self.where[0]), int(self.where[1])


def parse(uri: str) -> VideoUri:
    """Splits a `uri` into its parts."""
    match = _PATTERN.fullmatch(uri)
    if match is None:
        return VideoUri(uri)
    where = (urllib.parse.unquote(part) for part in match["where"].split(","))
    return VideoUri(match["path"], match["kind"], tuple(where))


def file_uri(path: str) -> str:
    """Builds the `uri` of a whole file, whatever its name is."""
    return path if "#" not in path or _PATTERN.fullmatch(path) is None else f"{path}#file="


def video_uri(path: str, kind: str, *where: object) -> str:
    """Builds the `uri` of video inside `path`.

    Args:
        path: file or folder, local or remote.
        kind: range | rlds | calvin | hdf5
        where: what that kind needs, see the top of this module.
    """
    return f"{path}#{kind}={','.join(_quoted(str(part)) for part in where)}"


def _quoted(part: str) -> str:
    # Cameras have whatever names the file gives them.
    return part.replace("%", "%25").replace(",", "%2C").replace("#", "%23")
