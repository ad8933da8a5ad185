"""The documentation: its Python runs, its links and references hold, its commands exist."""

import ast
import html
import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import fasp_graph as fg
from fasp_graph import cli
from fasp_graph.commands.flags import field_docs

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if blocks(p)], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """The blocks of a page are one program; they state by assert what the text claims."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "docs"}

    for number, block in enumerate(blocks(page), 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)

    assert any("assert" in block for block in blocks(page))


def test_the_readmes_own_model_goes_through_the_command_line(run, tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text()
    (mine,) = [block for block in blocks(ROOT / "README.md") if "def build" in block]
    calls = re.findall(r"^ {4}fasp-graph (.*mine:build.*)$", text, re.M)
    (tmp_path / "mine.py").write_text(mine)
    monkeypatch.chdir(tmp_path)

    for call in calls:
        code, _, error = run(*shlex.split(call))
        assert code == 0, error

    assert len(calls) == 2 and (tmp_path / "own/report.html").is_file()
    session = onnxruntime.InferenceSession(tmp_path / "own.onnx")
    feed = {held.name: np.zeros((5, 6), np.float32) for held in session.get_inputs()}
    assert session.run(None, feed)[0].shape == (5, 3)


def plain_text(markup):
    return " ".join(html.unescape(re.sub("<[^>]+>", "", markup)).split())


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))),
    reason="the documentation's tools are not installed: pip install -e '.[docs]'",
)
def test_the_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site/reference/index.html").read_text()
    assert page.count("fasp_graph.") > 5 and "<details" not in page
    items = dict(re.findall(r"<li [^>]*>\s*<b>(.*?)</b>(.*?)</li>", page, re.S))
    told = {plain_text(name): plain_text(text) for name, text in items.items()}
    for name, meaning in field_docs(fg.Config.__doc__).items():
        assert told[name].endswith(f"– {meaning}")


def test_commands_in_the_pages_exist():
    known = {command.name for command in cli.app.registered_commands}
    named = {
        match
        for page in PAGES
        for match in re.findall(r"^ {4}fasp-graph ([a-z]+)\b", page.read_text(), re.M)
    }

    assert named == known


def messages():
    """Every text in the sources but docstrings, with `...` where a value goes."""
    for path in (*(ROOT / "fasp_graph").rglob("*.py"), *(ROOT / "passes").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docs = {node.value for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            if not docs & {*parts} and isinstance(node, (ast.JoinedStr, ast.Constant)):
                yield "".join(
                    str(getattr(part, "value", "")) if isinstance(part, ast.Constant) else "..."
                    for part in parts
                )


def test_each_row_of_troubleshooting_is_a_message_of_the_sources():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    rows = re.findall(r"^\| `(.*?)`.*\|$", page, re.M)
    known = list(messages())

    unknown = []
    for row in rows:
        wanted = re.compile(".*".join(map(re.escape, row.split("..."))), re.S)
        if not any(wanted.search(text) for text in known):
            unknown.append(row)
    assert len(rows) > 25 and unknown == []


def test_links_between_pages_hold():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"
