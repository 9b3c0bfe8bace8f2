"""The commands and examples of the README."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


def _blocks(section: str, language: str) -> list[str]:
    start = README.split(f"## {section}\n", 1)[1] if section else README
    body = start.split("\n## ", 1)[0]
    return re.findall(rf"```{language}\n(.*?)```", body, flags=re.DOTALL)


def python_blocks(section: str) -> list[str]:
    """The Python examples of one section."""
    return _blocks(section, "python")


def commands(section: str) -> list[str]:
    """The shell commands of one section ("": above all of them), comments dropped and continued lines joined."""
    blocks = _blocks(section, "bash")
    lines = re.sub(r"\\\n\s*", "", "".join(blocks)).splitlines()
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in lines]
    return [line for line in lines if line]


def the_one(section: str, start: str) -> str:
    """The only command of a section that begins so."""
    found = [command for command in commands(section) if command.startswith(start)]
    assert len(found) == 1, f"README section '{section}' has {len(found)} commands that start with '{start}'"
    return found[0]
