"""What the README says is run or compared, so that it cannot go stale."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.cli.main import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands() -> list[list[str]]:
    """Every ``florence2 ...`` line of the README and the pages, as words without comments and
    redirections, each once."""
    found = [block for text in (README, *PAGES.values()) for block in blocks("bash", text)]
    joined = [re.sub(r"\\\n\s*", "", block) for block in found]
    lines = [line for block in joined for line in block.splitlines()]
    own = [line for line in lines if line.split(" ")[0].rsplit("/", 1)[-1] == "florence2"]
    split = [shlex.split(line.split(" < ")[0], comments=True)[1:] for line in own]
    return [list(words) for words in dict.fromkeys(map(tuple, split))]


def test_the_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    [example] = blocks("python")
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    assert "There is no image 'missing.png'" in capsys.readouterr().out
    assert len(names["results"]) == 2


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_every_option_of_a_command_line_exists(command):
    name, *words = command
    text = CliRunner().invoke(app, [name, "--help"]).output
    for option in (word for word in words if word.startswith("--")):
        assert option in text


def test_the_task_table_is_the_one_the_command_prints():
    printed = CliRunner().invoke(app, ["tasks", "--markdown"])
    table = re.search(r"<!-- tasks:.*?-->\n(.*?)<!-- /tasks -->", README, re.DOTALL)
    assert table is not None
    assert table.group(1).strip() == printed.output.strip()


def test_every_runtime_dependency_has_its_reason():
    table = PAGES[ROOT / "docs" / "dependencies.md"]
    named = {
        name
        for row in re.findall(r"^\| ([a-z0-9_, -]+) \|", table, re.MULTILINE)
        for name in row.split(", ")
    }
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].items()
    # What only developers install needs no reason there.
    asked = [one for extra, ones in extras if extra not in ("dev", "soak") for one in ones]
    pinned |= {re.split(r"==|\[", one)[0] for one in asked}
    assert pinned <= named
    assert named - pinned == {"package", "---"}


@pytest.mark.parametrize("target", re.findall(r"make (\w+)", README))
def test_every_make_target_exists(target):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def anchors(text: str) -> set[str]:
    """As they are made of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_linked_page_and_its_heading_exist(page):
    links = re.findall(r"\]\((?!https?:)([^)\s#]*)(?:#([^)\s]+))?\)", page.read_text("utf-8"))
    for link, anchor in links:
        target = page.parent / link if link else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), f"{link}#{anchor}"
