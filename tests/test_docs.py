"""The documentation stays true: the paths it names exist, its terms are in use, its examples run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = sorted(
    [
        *DOCS.glob("*.md"),
        *REPOSITORY.glob("*.md"),
        REPOSITORY / "benchmarks" / "RESULTS.md",
        REPOSITORY / "defi_client" / "README.md",
    ]
)
TOP = ("platform", "defi_models", "defi_client", "configs", "jobs", "cluster", "tests", "benchmarks", "docs")


def page_ids(page: Path) -> str:
    return page.name


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_paths_that_a_page_names_exist(page: Path) -> None:
    quoted = re.findall(r"`([^`\s]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    paths = {name for name in quoted if name.split("/")[0] in TOP and "/" in name.rstrip("/")}
    absent = {name for name in paths if "*" not in name and not (REPOSITORY / name).exists()}
    absent |= {name for name in paths if "*" in name and not list(REPOSITORY.glob(name))}
    assert absent == set()


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_architecture_answers_where_to_look() -> None:
    table = re.findall(
        r"^\| (.+\?) \| `([^`]+)` \|$", (DOCS / "architecture.md").read_text(), flags=re.MULTILINE
    )
    assert len(table) >= 25
    assert len({question for question, _ in table}) == len(table)
    assert [path for _, path in table if not (REPOSITORY / path).is_file()] == []


def test_the_architecture_lists_the_layers_that_are_checked() -> None:
    from test_layout import LAYERS

    lines = re.findall(r"^\d+\. (`.+`)$", (DOCS / "architecture.md").read_text(), flags=re.MULTILINE)
    written = [set(re.findall(r"`([^`]+)`", line)) for line in lines]
    checked = [
        {member.removeprefix("defi_platform.").replace(".", "/") for member in layer} for layer in LAYERS
    ]
    assert written == checked


def test_every_term_of_the_glossary_is_used_and_defined_once() -> None:
    terms = re.findall(r"^\*\*([^*]+)\*\*: \S", (DOCS / "glossary.md").read_text(), flags=re.MULTILINE)
    words = [word.strip().lower() for term in terms for word in re.sub(r"\(.*?\)", "", term).split(",")]
    assert len(terms) > 20 and len(words) == len(set(words)) + 1, "only the probe has two meanings"
    assert terms == sorted(terms, key=str.lower)
    files = [*REPOSITORY.glob("platform/**/*.py"), *REPOSITORY.glob("defi_models/**/*.py"), *PAGES]
    text = "\n".join(file.read_text() for file in files if file.name != "glossary.md").lower()
    text = re.sub(r"[\s_-]+", " ", text)
    assert [word for word in words if not re.search(rf"\b{re.escape(word)}(e?s)?\b", text)] == []


def test_make_docs_builds_the_reference_of_both_packages(tmp_path: Path) -> None:
    line = re.search(r"^docs:.*\n\t(.+)$", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert line
    command = (
        line[1].replace("$(BIN)/python", sys.executable).replace("build/docs", f"{tmp_path} --no-source")
    )
    built = subprocess.run(command, shell=True, cwd=REPOSITORY, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    pages = {str(page.relative_to(tmp_path)) for page in tmp_path.rglob("*.html")}
    wanted = set()
    for root, package in (
        (REPOSITORY / "platform", "defi_platform"),
        (REPOSITORY, "defi_models"),
        (REPOSITORY, "defi_client"),
    ):
        for file in (root / package).rglob("*.py"):
            module = file.parent if file.name == "__init__.py" else file
            wanted.add(str(module.relative_to(root).with_suffix(".html")))
    assert wanted - pages == set()
    plan = (tmp_path / "defi_platform/data/sampling/plan.html").read_text()
    assert "Arguments:</h6>" in plan, "Args: of the google style become a list"


def test_the_hooks_run_what_make_lint_runs() -> None:
    lint = re.search(r"^lint:.*\n((?:\t.+\n)+)", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE)
    assert lint
    commands = [line.strip().replace("$(BIN)", ".venv/bin") for line in lint[1].splitlines()]
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for repo in hooks for hook in repo["hooks"]] == commands
    assert all(repo["repo"] == "local" for repo in hooks), "hooks need no network"


def test_ci_runs_its_script() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step.get("run") for job in workflow["jobs"].values() for step in job["steps"]]
    assert ".ci/run" in steps
    script = REPOSITORY / ".ci" / "run"
    assert shutil.which(str(script)), "it is executable"
    assert {"make lint", "make test"} <= set(script.read_text().splitlines())
