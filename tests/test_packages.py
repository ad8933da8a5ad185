"""Packages run where this project is not installed, with the same numbers."""

import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn

import fasp_graph as fg
from fasp_graph.exports import packages
from passes.errors import VerificationError

LOAD = """
import sys, torch
sys.path = [entry for entry in sys.path if entry]
folder, others = sys.argv[1], sys.argv[2:]
x = torch.load(folder + "/x")
loaded = {"a.pt2": lambda path: torch.export.load(path).module(),
          "b.pt2": torch._inductor.aoti_load_package}
for name in others:
    torch.save(loaded[name](f"{folder}/{name}")(x), f"{folder}/{name}.out")
assert "fasp_graph" not in sys.modules and "passes" not in sys.modules
"""


@pytest.fixture(scope="module")
def pruned():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 4))
    config = fg.Config(method="magnitude", sparsity=0.5)
    return fg.prune(model, torch.randn(3, 6), None, config)


def test_a_fresh_process_gets_the_same_numbers(pruned, tmp_path):
    compiled = any(shutil.which(name) for name in packages.COMPILERS)
    found = [fg.export(pruned, tmp_path / "a.pt2", "pt2")]
    if compiled:
        found.append(fg.export(pruned, tmp_path / "b.pt2", "aoti"))
    x = torch.randn(8, 6)  # another batch: the axis is dynamic
    torch.save(x, tmp_path / "x")
    names = [file for made in found for file in made.files]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path), *names],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert [made.format for made in found] == ["pt2", "aoti"][: len(found)]
    for name in names:
        torch.testing.assert_close(torch.load(f"{tmp_path / name}.out"), pruned.model(x))


def test_a_file_holds_no_path_of_this_machine(pruned, tmp_path):
    found = fg.export(pruned, tmp_path / "a.pt2", "pt2")

    with zipfile.ZipFile(found.path) as file:
        held = b"".join(file.read(name) for name in file.namelist())
    assert b"stack_trace" not in held
    assert not re.search(rb"/[^\s\"]+[.]py\b", held)


def test_a_mismatch_writes_nothing(pruned, tmp_path, monkeypatch):
    load = torch.export.load

    def wrong(path):
        program = load(path)
        next(iter(program.state_dict.values())).add_(1.0)
        return program

    monkeypatch.setattr(torch.export, "load", wrong)

    with torch.no_grad(), pytest.raises(VerificationError, match="differ by"):
        fg.export(pruned, tmp_path / "a.pt2", "pt2")

    assert list(tmp_path.iterdir()) == []


def test_other_sizes_are_compared(pruned, tmp_path, monkeypatch):
    load = torch.export.load

    class Program:
        """Computes as it should at the batch size of the example alone."""

        def __init__(self, path):
            self.run = load(path).module()

        def module(self):
            return lambda x: self.run(x) + (len(x) != 3)

    monkeypatch.setattr(torch.export, "load", Program)

    with pytest.raises(VerificationError, match="differ by"):
        fg.export(pruned, tmp_path / "a.pt2", "pt2")

    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written(pruned, tmp_path, monkeypatch):
    with pytest.raises(fg.FaspGraphError, match=r"must end in .pt2 · help: a.pt2"):
        fg.export(pruned, tmp_path / "a.bin", "pt2")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(fg.FaspGraphError, match="needs a C\\+\\+ compiler"):
        fg.export(pruned, tmp_path / "b.pt2", "aoti")
