"""What the README tells its reader to type."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_text()


def commands(section: str) -> list[str]:
    """The shell commands of one section, comments dropped and continued lines joined."""
    body = README.split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    blocks = re.findall(r"```bash\n(.*?)```", body, flags=re.DOTALL)
    lines = re.sub(r"\\\n\s*", "", "".join(blocks)).splitlines()
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in lines]
    return [line for line in lines if line]


def the_one(section: str, start: str) -> str:
    """The only command of a section that begins so."""
    found = [command for command in commands(section) if command.startswith(start)]
    assert len(found) == 1, f"README section '{section}' has {len(found)} commands that start with '{start}'"
    return found[0]
