"""Parts of the self-contained HTML pages: one file, no scripts, nothing fetched from anywhere."""

from __future__ import annotations

import base64
import html
import mimetypes
import posixpath
import re
from collections.abc import Iterable, Sequence
from typing import Any

from defi_platform import storage


def document(
    title: str, heading: str, sections: Iterable[str], lead: str = "", contents: bool = False
) -> str:
    """A whole page.

    Args:
        sections: made by `section`.
        lead: plain text under the heading.
        contents: with a list of links to the sections.
    """
    parts = list(sections)
    body = "".join(parts)
    head = f"<h1>{html.escape(heading)}</h1>" + (f"<p class='lead'>{html.escape(lead)}</p>" if lead else "")
    if contents:
        found = re.findall(r'<section id="([^"]+)"><h2>(.*?)</h2>', body)
        links = "".join(f'<li><a href="#{anchor}">{name}</a></li>' for anchor, name in found)
        head += f'<nav aria-label="Contents"><ul>{links}</ul></nav>'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>\n{head}{body}</main></body></html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    """A titled part of a page; `body` is HTML, `note` plain text above it."""
    note = f"<p>{html.escape(note)}</p>" if note else ""
    return f'<section id="{_anchor(title)}"><h2>{html.escape(title)}</h2>{note}{body}</section>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """A table of plain texts and numbers; a column of numbers is set flush right."""
    cells = [[str(value) for value in row] for row in rows]
    numeric = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(head))]
    kinds = [' class="number"' if number else "" for number in numeric]
    first = "".join(
        f'<th scope="col"{kind}>{html.escape(name)}</th>' for name, kind in zip(head, kinds, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{html.escape(value)}</td>" for value, kind in zip(row, kinds, strict=True))
        + "</tr>"
        for row in cells
    )
    above = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{above}<thead><tr>{first}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(content: bytes, alt: str, kind: str = "image/jpeg") -> str:
    """An image that is part of the page."""
    return f'<img alt="{html.escape(alt)}" src="data:{kind};base64,{base64.b64encode(content).decode()}">'


def figure(body: str, caption: str) -> str:
    """A picture or chart (HTML) with a plain caption."""
    return f"<figure>{body}<figcaption>{html.escape(caption)}</figcaption></figure>"


def data_url(path: str) -> str:
    """The content of a stored file as a URL of its own."""
    kind = mimetypes.guess_type(posixpath.basename(path))[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(storage.read_bytes(path)).decode()}"


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"-?[\d,. ]+( ?(%|s|h|ms|fps|MB|GB))?|-|", text))


STYLE = """
body { margin: 0; background: #f4f5f7; color: #222; font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 24px; }
section { background: #fff; border: 1px solid #e3e6ea; border-radius: 8px; margin: 0 0 18px; padding: 4px 22px 18px; }
h1 { font-size: 24px; } h2 { font-size: 17px; margin-bottom: 6px; } h3 { font-size: 14px; margin: 18px 0 4px; }
.lead { color: #445; max-width: 46em; } a { color: #1f5796; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; margin: 0 0 18px; padding: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0; } caption { text-align: left; color: #556; padding: 2px 0; }
th, td { text-align: left; padding: 4px 18px 4px 0; border-bottom: 1px solid #eceef1; vertical-align: top; font-variant-numeric: tabular-nums; }
th { color: #556; font-weight: 600; } .number { text-align: right; }
svg, img { max-width: 100%; height: auto; display: block; margin: 8px 0; }
img { width: 100%; image-rendering: pixelated; }
.grid { display: grid; gap: 14px; }
.sheet { display: grid; gap: 12px 20px; grid-template-columns: repeat(auto-fill, minmax(460px, 1fr)); }
.sheet img, .thumbs img { image-rendering: auto; margin: 0 0 3px; border-radius: 3px; }
.thumbs { display: flex; flex-wrap: wrap; gap: 12px; } .thumbs figure { width: 170px; }
figure { margin: 0; } video { width: 100%; image-rendering: pixelated; background: #000; }
video.clips { width: min(100%, 420px); }
figcaption { font-size: 12px; color: #556; overflow-wrap: anywhere; }
@media (max-width: 560px) { .sheet { grid-template-columns: 1fr; } section { padding: 2px 12px 12px; } }
"""
