"""Ctrl-C, sent to real processes: exit code 130, one line that says what is left, no traceback."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONSOLE = ("-c", "from fasp_graph_entry import main; main()")
MODULE = ("-m", "fasp_graph")


def start(folder, *words, path=(), by=CONSOLE):
    variables = {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT))), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *by, *words],
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell may ignore it
    )


@pytest.mark.parametrize("library", ["torch", "typer"])
@pytest.mark.parametrize("by", [CONSOLE, MODULE], ids=["console", "module"])
def test_while_libraries_load(tmp_path, by, library):
    stop = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / f"{library}.py").write_text(stop)

    process = start(tmp_path, "zoo", path=[tmp_path], by=by)

    assert process.communicate(timeout=120) == ("", "interrupted\n")
    assert process.returncode == 130


STATE = """
import os, signal
def state():
    return signal.getsignal(signal.SIGINT), os.environ.get("OMP_WAIT_POLICY")
before = state()
"""
STAYS = "import fasp_graph; print(state() == before)"


def test_threads_sleep_where_they_wait_for_each_other(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    code = STATE + "import fasp_graph_entry as e; e._before_libraries(); print(state()[1])"

    assert start(tmp_path, by=("-c", code)).communicate(timeout=120)[0] == "PASSIVE\n"


def test_a_program_that_imports_the_package_keeps_its_own_handler_and_variables(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    whole = start(tmp_path, "-m", "fasp_graph", by=("-c", STATE + STAYS))
    assert whole.communicate(timeout=120)[0] == "True\n"

    early = "import __main__ as m, os; print(m.state() == m.before, flush=True); os._exit(0)"
    (tmp_path / "torch.py").write_text(early)  # the first library that is slow to load
    (tmp_path / "my_program.py").write_text(STATE + STAYS)
    for by in (("my_program.py", "-m", "fasp_graph"), ("-m", "my_program")):
        process = start(tmp_path, "-m", "fasp_graph", path=[tmp_path], by=by)
        assert process.communicate(timeout=120)[0] == "True\n"


MINE = """
import os, signal, sys, torch
from torch import nn

def stop(event, args):
    if event == "os.rename" and str(args[1]).endswith("00001.safetensors"):
        os.kill(os.getpid(), signal.SIGINT)

def build():
    if "STOP" in os.environ:
        sys.addaudithook(stop)
    torch.manual_seed(0)
    sizes = [(6, 16), (16, 16), (16, 16), (16, 3)]
    layers = [layer for size in sizes for layer in (nn.Linear(*size), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(3, 6), [torch.randn(64, 6)]
"""


def test_a_run_that_can_go_on_says_from_where(tmp_path, monkeypatch):
    (tmp_path / "my_model.py").write_text(MINE)
    asked = ("prune", "my_model:build", "--output", "small", "--json")

    monkeypatch.setenv("STOP", "before the journal's second stop")
    process = start(tmp_path, *asked)

    out, error = process.communicate(timeout=120)
    assert (process.returncode, out, error) == (
        130,
        "",
        "interrupted · nothing was written to small · run the same command to go on from "
        ".small.work, or delete .small.work\n",
    )
    assert [path.name for path in tmp_path.glob(".small.work/*.safetensors")] == [
        "00000.safetensors"
    ]
    assert not (tmp_path / "small").exists()
    monkeypatch.delenv("STOP")
    done = start(tmp_path, *asked)
    assert json.loads(done.communicate(timeout=300)[0])["params_after"]
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"my_model.py", "small"}


@pytest.mark.parametrize(
    ("more", "left"), [((), ""), (("--output", "small"), " · nothing was written to small")]
)
def test_a_run_without_a_work_folder(tmp_path, more, left):
    (tmp_path / "my_stop.py").write_text(
        "import os, signal\ndef build():\n    os.kill(os.getpid(), signal.SIGINT)\n"
    )

    process = start(tmp_path, "prune", "my_stop:build", *more)

    out, error = process.communicate(timeout=120)
    assert (process.returncode, out, error) == (130, "", f"interrupted{left}\n")
