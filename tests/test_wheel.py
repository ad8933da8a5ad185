"""The built wheel, installed alone in an empty folder, holds its data and prunes offline."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("fasp_graph", "passes", "models_zoo")
ENTRY = "fasp_graph_entry.py"
FILES = ("pyproject.toml", "README.md", "LICENSE", ENTRY)

PRUNE = """
import pathlib, socket, sys

def refuse(*arguments, **options):
    raise OSError("this test allows no network")

socket.socket.connect = refuse
socket.getaddrinfo = refuse

import fasp_graph, models_zoo, passes.capture, passes.rules

home = pathlib.Path(sys.argv[1]).resolve()
for module in (fasp_graph, models_zoo, passes.capture, passes.rules):
    assert home in pathlib.Path(module.__file__).resolve().parents, module.__file__
entry = models_zoo.load("llama")
config = fasp_graph.Config(sparsity=0.3, method="fasp")
batches = [{"input_ids": entry.calibration[0]["input_ids"][:4]}]
pruned = fasp_graph.prune(entry.model, entry.inputs, batches, config)
assert pruned.report.params_after < pruned.report.params_before
assert pruned.model(**entry.inputs).logits.isfinite().all()
print("pruned", pruned.report.params_before, pruned.report.params_after)
"""


def call(*command, cwd, **variables):
    """Run, and show all output on failure."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that leftovers of earlier builds cannot get in."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, source / name)
    output = tmp_path_factory.mktemp("dist")
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    call("-m", "pip", "wheel", *options, "--wheel-dir", output, source, cwd=source)
    (built,) = output.glob("fasp_graph-*.whl")
    return built


def test_wheel_holds_every_file_of_the_packages(wheel):
    wanted = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }

    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {*wanted, ENTRY}


@pytest.mark.skipif(
    not (ROOT / "models_zoo/data/llama/model.safetensors").exists(),
    reason="no bundled weights: run `python -m models_zoo.train llama`",
)
def test_installed_wheel_prunes(wheel, tmp_path):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", home)
    call(*install, wheel, cwd=elsewhere)

    assert (home / "models_zoo/data/llama/model.safetensors").exists()
    assert (home / "fasp_graph/pages/templates/graph.html").exists()
    said = call("-c", PRUNE, home, cwd=elsewhere, PYTHONPATH=str(home))
    assert said.splitlines()[-1].startswith("pruned")
