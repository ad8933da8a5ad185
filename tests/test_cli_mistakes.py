"""Mistakes at the command line: exit code 2, and one message that names the flag to mend."""

import os
import subprocess
import sys

import pytest

import fasp_graph as fg
import models_zoo
from fasp_graph import cli

DATA = """
import torch

number = 5

def nothing():
    return None

def five():
    return 5

def fails():
    raise KeyError("no such column")

def fails_later():
    yield torch.zeros(1, 6)
    raise KeyError("no such column")

def build():
    layers = [torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 2)]
    return torch.nn.Sequential(*layers), torch.randn(4, 6)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder to work in that holds a module of the user's."""
    (tmp_path / "my_mistakes.py").write_text(DATA)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(told, *words):
    """The one message of a call that is refused."""
    code, out, error = told
    assert code == 2, error
    assert out == "" and "Traceback" not in error and "this is a bug" not in error
    assert error.count("help:") == 1 and all(word in error for word in words), error


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "returned NoneType, not batches"),
        ("five", "returned int, not batches"),
        ("fails", "failed: KeyError: 'no such column'"),
        ("fails_later", "failed: KeyError: 'no such column'"),
        ("number", "failed: TypeError: 'int' object is not callable"),
        ("absent", "cannot import my_mistakes:absent"),
    ],
)
def test_a_factory_of_data_that_gives_none(run, mine, name, message):
    source = f"my_mistakes:{name}"

    told = run("prune", "my_mistakes:build", "--calibration", source)

    refused(told, message, "--calibration" if name != "absent" else "package.module:name")
    if name != "absent":
        refused(run("eval", "my_mistakes:build", "--data", source), f"{source}", "--data")


@pytest.mark.parametrize("words", [("eval",), ("bench", "--no-onnx", "--no-memory")])
def test_a_model_that_fails_on_its_own_inputs(run, mine, words):
    (mine / "my_misfit.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(6, 2), torch.zeros(3, 7)\n"
    )

    told = run(words[0], "my_misfit:build", *words[1:])

    refused(told, "my_misfit:build fails on its example inputs: RuntimeError: mat1", "--debug")


def test_a_module_of_the_users_that_cannot_be_read(run, mine):
    (mine / "my_slip.py").write_text("def build(:")

    refused(run("inspect", "my_slip:build"), "cannot import my_slip:build: SyntaxError")


def test_a_broken_image(run, mine):
    pytest.importorskip("PIL", reason="Pillow is not installed")
    (mine / "images/class").mkdir(parents=True)
    (mine / "images/class/a.png").write_bytes(b"no image")

    refused(run("prune", "zoo:resnet", "--calibration", "images"), "a.png is no image", "--data")
    refused(run("eval", "zoo:resnet", "--data", "images"), "a.png is no image", "--data")


def test_a_negative_stride(run):
    code, _, error = run("eval", "zoo:llama", "--stride", -5)

    assert code == 2 and "--stride" in error


def test_windows_longer_than_the_models_positions(run, mine):
    (mine / "text.txt").write_text("def area(radius):\n    return 3.14 * radius ** 2\n" * 90)
    long = ("--length", 1000)

    positions = ("llama has 256 positions", "1000 tokens", "help: --length 256")
    refused(run("eval", "zoo:llama", "--data", "text.txt", *long), *positions)
    refused(run("prune", "zoo:llama", "--calibration", "text.txt", *long), *positions)
    refused(run("prune", "zoo:llama", "--evaluation", "text.txt", *long), *positions)
    asked = ("bench", "zoo:gpt2", "zoo:gpt2", "--no-onnx", "--no-memory")
    refused(run(*asked, *long), "gpt2 has 64 positions", "help: --length 64")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--explain", "a", "--format", "dot"), ("--explain", "--format", "contradict each other")),
        (
            ("--explain", "a", "--output", "a.dot"),
            ("--explain", "--output", "contradict each other"),
        ),
        (("--json", "--format", "dot"), ("--json", "--format", "one of them")),
        (("--html", "none/graph.html"), ("none/graph.html", "create it first")),
        (("--output", "none/graph.dot"), ("none/graph.dot", "create it first")),
        (("--html", "."), ("it is a folder",)),
        (("--output", "graph.html"), ("no format 'html'", "--html FILE")),
        (("--output", "graph"), ("the ending of graph names no format", "one of json, dot")),
    ],
)
def test_inspect_refuses_before_it_loads_anything(run, mine, monkeypatch, more, words):
    monkeypatch.setattr("fasp_graph.commands.inspecting.load_target", None)  # would be work

    refused(run("inspect", "zoo:resnet", *more), *words)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("--output", "afile/x"), ("cannot write afile/x: afile is a file", "--output")),
        (("--output", "folder"), ("folder exists and is no fasp_graph folder",)),
        (("--stream",), ("--method fasp, or --allocation uniform",)),
    ],
)
def test_prune_refuses_before_it_loads_anything(run, mine, monkeypatch, asked, words):
    monkeypatch.setattr("fasp_graph.commands.pruning.load_target", None)  # would be work
    (mine / "afile").write_text("mine")
    (mine / "folder").mkdir()
    (mine / "folder/notes.txt").write_text("mine")

    refused(run("prune", "zoo:resnet", *asked), *words)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (("x.txt",), ("x.txt must end in .onnx", "help: x.onnx")),
        (("x.onnx", "--format", "pt2"), ("x.onnx must end in .pt2", "help: x.pt2")),
        (("none/x.onnx",), ("none/x.onnx", "create it first")),
        (("none/x.onnx", "--cache"), ("none/x.onnx", "create it first")),
        (("x.onnx", "--format", "onnnx"), ("no format 'onnnx'", "one of onnx, pt2, aoti")),
        (("x.onnx", "--dtype", "fp16"), ("no dtype 'fp16'", "one of float32")),
    ],
)
def test_export_refuses_before_it_loads_anything(run, mine, monkeypatch, asked, words):
    monkeypatch.setattr("fasp_graph.commands.measuring.load_target", None)  # would be work

    refused(run("export", "zoo:resnet", *asked), *words)


def test_a_model_without_data_is_refused_before_capture(run, mine, monkeypatch):
    monkeypatch.setattr("fasp_graph.commands.pruning.prune", None)  # would be work

    told = run("prune", "my_mistakes:build")

    refused(told, "need calibration batches", "help: pass --calibration ..., or --method magnitude")


def test_recover_without_data(run, mine):
    folder = mine / "small"
    asked = ("prune", "decoding:llama", "--method", "magnitude", "--output", folder)
    assert run(*asked)[0] == 0

    idle = ("there is nothing to train on", "help: --data DATA, or --distill MODEL")
    refused(run("recover", folder, "--output", "better"), *idle)
    own = ("--distill", "my_mistakes:build")  # comes without calibration data
    refused(run("recover", folder, "--output", "better", *own), *idle)
    told = run("recover", "zoo:llama-random", "--output", "better", "--data", "text.txt")
    refused(told, "zoo:llama-random is no folder that prune wrote")


def test_an_unknown_name_is_told_the_close_ones(run):
    refused(
        run("inspect", "zoo:resnet", "--explain", "layer1.0.conv1.wieght"),
        *("close names: layer1.0.conv1.weight, ", "no parameter 'layer1.0.conv1.wieght'"),
    )


@pytest.mark.parametrize(
    ("python", "flags"),
    [
        (
            "no data · help: calibration=..., or method='fasp'",
            "--calibration ..., or --method fasp",
        ),
        ("x · help: lora=0 trains all weights", "--lora 0 trains all weights"),
        ("x · help: another min_keep or align", "another --min-keep or align"),
        ("x · help: Config(seed=...), in a file seed = 1", "Config(seed=...), in a file seed = 1"),
        ("x · help: Config(min_keep=...), in a file min_keep = 1", "a file min_keep = 1"),
        ("x · help: load(folder, model=a fresh one)", "load(folder, model=a fresh one)"),
    ],
)
def test_the_way_out_is_told_in_flags(python, flags):
    told = cli.in_flags(python)

    assert told.endswith(flags) and told.partition(" · ")[0] == python.partition(" · ")[0]


def test_what_was_written_is_said(run, mine):
    asked = ("inspect", "zoo:kan", "--html", "graph.html", "--output", "graph.dot")
    code, out, error = run(*asked)

    assert code == 0 and out == "" and error == "wrote graph.html\nwrote graph.dot\n"


CONNECT = """
import socket
tried = []
def refuse(name, *_, **__):
    tried.append(name)
    raise OSError("no network")
socket.getaddrinfo = refuse
import sys
from fasp_graph.cli import main
sys.argv = ["fasp-graph", *%r]
try:
    main()
except SystemExit as done:
    print(done.code, len(tried))
"""


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("inspect", "someone/nothing"), "the hub gave no model"),
        (("eval", "zoo:llama", "--data", "someone/texts"), "the hub gave no data set"),
    ],
)
def test_without_a_network_names_fail_at_once_and_in_one_line(asked, message):
    variables = {**os.environ, "HF_HUB_OFFLINE": "0"}
    for name in list(variables):
        variables.pop(name) if "proxy" in name.lower() else None

    done = subprocess.run(
        [sys.executable, "-c", CONNECT % [*asked]], env=variables, capture_output=True, text=True
    )

    assert done.stdout == "2 1\n"  # one try
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_a_file_is_no_model(run, mine):
    (mine / "model.bin").write_text("mine")

    refused(run("inspect", "model.bin"), "model.bin is a file, not the folder of a model")


def test_a_folder_that_was_pruned_before_is_refused_before_the_work(run, tmp_path, monkeypatch):
    entry = models_zoo.load("llama-random")
    config = fg.Config(sparsity=0.2, method="magnitude")
    once = fg.prune(entry.model, entry.inputs, None, config).save(tmp_path / "once")
    monkeypatch.setattr("fasp_graph.commands.pruning.prune", lambda *_: pytest.fail("worked"))

    told = run("prune", str(once), "--method", "magnitude", "--output", str(tmp_path / "twice"))

    refused(told, "before it was pruned here", "prune the original model once")
    assert not (tmp_path / "twice").exists()
