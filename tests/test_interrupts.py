"""Ctrl-C, sent to real processes: exit code 130, one line that says what is left, no traceback."""

import contextlib
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


def interrupted(process, ready=lambda: True):
    """Send SIGINT as soon as it is ready; its one line."""
    while process.poll() is None and not ready():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.01)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert out == "" and error.count("\n") == 1
    return error.strip()


@pytest.mark.parametrize("library", ["torch", "typer"])
@pytest.mark.parametrize("by", [CONSOLE, MODULE], ids=["console", "module"])
def test_while_libraries_load(tmp_path, by, library):
    stop = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    (tmp_path / f"{library}.py").write_text(stop)

    process = start(tmp_path, "zoo", path=[tmp_path], by=by)

    assert process.communicate(timeout=120) == ("", "interrupted\n")
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("by", "policy"),
    [
        (("-c", "import fasp_graph_entry as e; e._before_libraries(); "), "PASSIVE"),
        (("-c", "import fasp_graph; "), "None"),
    ],
    ids=["command", "package"],
)
def test_threads_sleep_where_they_wait_for_each_other(tmp_path, by, policy, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    code = by[1] + "import os; print(os.environ.get('OMP_WAIT_POLICY'))"

    assert start(tmp_path, by=("-c", code)).communicate(timeout=120)[0] == f"{policy}\n"


def test_a_program_that_imports_the_package_keeps_its_own_handler(tmp_path):
    code = "import signal; then = signal.getsignal(signal.SIGINT); import fasp_graph; "
    code += "print(signal.getsignal(signal.SIGINT) is then)"

    (tmp_path / "my_program.py").write_text(code)
    for by in (("-c", code), ("my_program.py", "-m", "fasp_graph"), ("-m", "my_program")):
        process = start(tmp_path, "-m", "fasp_graph", by=by)
        assert process.communicate(timeout=120)[0] == "True\n"


def test_a_run_that_can_go_on_says_from_where(tmp_path):
    asked = ("prune", "zoo:llama", "--output", "small", "--json")
    work = tmp_path / ".small.work"

    told = interrupted(start(tmp_path, *asked), lambda: list(work.glob("*.safetensors")))

    assert told == (
        "interrupted · nothing was written to small · run the same command to go on from "
        ".small.work, or delete .small.work"
    )
    assert not (tmp_path / "small").exists()
    done = start(tmp_path, *asked)
    assert json.loads(done.communicate(timeout=300)[0])["params_after"]
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


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
