"""The benchmarks: each can be called as its page says; what the other tool is held to."""

import importlib
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
COMMANDS = sorted(p.stem for p in FOLDER.glob("*.py") if "\nif __name__ ==" in p.read_text())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_benchmark_says_how_it_is_called(name, monkeypatch, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])

    with pytest.raises(SystemExit) as stop:
        module.main()

    assert stop.value.code == 0
    assert "usage: " in capsys.readouterr().out
    assert f"python -m benchmarks.{name}" in module.__doc__


def test_no_page_calls_a_benchmark_by_its_path():
    """By its path a benchmark finds neither the packages beside it nor its companions."""
    pages = [*FOLDER.parent.glob("*.md"), *FOLDER.parent.glob("docs/**/*.md"), *FOLDER.glob("*.py")]

    assert not [p for p in pages if re.search(r"python benchmarks/", p.read_text())]
