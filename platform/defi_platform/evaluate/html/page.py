"""Rendering of the self-contained HTML pages: one file, no scripts, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import mimetypes
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from defi_platform import storage


@dataclass(frozen=True)
class Table:
    """A table of plain texts and numbers; columns of numbers are set flush right."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether it has numbers only."""
        return [
            bool(self.rows) and all(_is_number(str(row[column])) for row in self.rows)
            for column in range(len(self.head))
        ]


@dataclass(frozen=True)
class Picture:
    """A picture or video with a caption; without a `url`, the `alt` text is shown in its stead."""

    caption: str
    alt: str
    url: str = ""

    @property
    def is_video(self) -> bool:
        """True for a picture that moves."""
        return self.url.startswith("data:video/")


def render(template: str, **values: Any) -> str:
    """Fills in a template of this package; texts among the values are escaped, `Markup` is not.

    Args:
        template: file name in templates/.
        **values: every variable of the template.
    """
    return _environment.get_template(template).render(values)


def data_url(content: bytes, kind: str) -> str:
    """A URL that holds the content itself; `kind` is its media type, such as "image/jpeg"."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def file_url(path: str) -> str:
    """A URL that holds the content of a stored file, local or remote."""
    kind = mimetypes.guess_type(posixpath.basename(path))[0] or "application/octet-stream"
    return data_url(storage.read_bytes(path), kind)


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"-?[\d,. ]+( ?(%|s|h|ms|fps|MB|GB))?|-|", text))


_environment = Environment(
    loader=PackageLoader(__package__),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters["anchor"] = _anchor
