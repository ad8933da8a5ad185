"""Mistakes at the command line: exit code 2, and one message that names the flag to mend."""

import pytest

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
