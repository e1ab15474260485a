"""The pages say what the program does: every command in them parses, every link leads somewhere, generated pages are current."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from trebuchet.launcher.cli import parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(page: Path) -> list[str]:
    """`trebuchet …` in indented or fenced blocks: up to a comment, two spaces or a pipe."""
    found = re.findall(
        r"^(?: {4,}|)\$? *(?:\.venv/bin/)?trebuchet ((?!\.\.\.)[^\n]+)$", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    return [re.split(r"\s{2,}|\s#|\s[|>]", line)[0] for line in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path) -> None:
    for line in commands(page):
        words = [word for word in shlex.split(line.replace("…", "")) if word not in ("[FOLDER]",)]
        if words and words[0].isalpha():
            parser().parse_args(words)  # SystemExit(2), with the reason, where the page is wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_configuration_page_is_current() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["page"]
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == page(), "run: python docs/generate.py"


def test_there_are_commands_to_check() -> None:
    assert sum(len(commands(page)) for page in PAGES) >= 10


def test_the_planner_s_figure_is_current() -> None:
    figure = runpy.run_path(str(ROOT / "docs" / "planner_figure.py"))["figure"]
    assert (ROOT / "docs" / "planner.svg").read_text(encoding="utf-8") == figure(), "run: python docs/planner_figure.py"
