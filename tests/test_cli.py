"""The command line, called in this process."""

import dataclasses
import inspect
import json
import sys

import pytest
import torch
from rich.console import Console

import fasp_graph as fg
from fasp_graph import cli, data, demo


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fasp-graph", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call


def test_flags_are_the_fields_of_config():
    flags = set(inspect.signature(cli.prune_command).parameters)

    assert {field.name for field in dataclasses.fields(fg.Config)} <= flags


def test_inspect(run, tmp_path):
    code, out, _ = run("inspect", "zoo:opt-random", "--json", "--html", tmp_path / "graph.html")

    assert code == 0
    assert {"chain", "frozen"} <= {group["kind"] for group in json.loads(out)["groups"]}
    assert (tmp_path / "graph.html").is_file()


def test_prune_eval_and_export_a_folder(run, tmp_path):
    folder = tmp_path / "small"
    code, out, error = run(
        *("prune", "zoo:llama-random", "--sparsity", 0.4, "--align", 2, "--json"),
        *("--output", folder),
    )
    assert code == 0, error
    report = json.loads(out)

    code, out, error = run("eval", folder, "--json")
    assert code == 0, error
    assert json.loads(out)["parameters"] == report["params_after"] < report["params_before"]

    code, out, error = run("export", folder, tmp_path / "small.onnx", "--json")
    assert code == 0, error
    assert json.loads(out)["bytes"] == (tmp_path / "small.onnx").stat().st_size


def test_a_factory(run, tmp_path, monkeypatch):
    (tmp_path / "my_factory.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(\n"
        "        torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 2))\n"
        "    return model, torch.randn(4, 6), [torch.randn(32, 6)]\n"
    )
    monkeypatch.chdir(tmp_path)

    code, out, error = run("prune", "my_factory:build", "--json")

    assert code == 0, error
    assert json.loads(out)["verify_max_error"] < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "zoo:nothing"), "opt-random"),
        (("inspect", "no_such_package:build"), "cannot import"),
        (("inspect", "./no/such/folder"), "no folder here"),
        (("prune", "zoo:resnet", "--sparsity", "7"), "sparsity=7.0"),
        (("prune", "zoo:resnet", "--method", "guess"), "fasp, magnitude"),
        (("prune", "zoo:resnet", "--calibration", "text.txt"), "no tokenizer"),
        (("prune", "--sparsity", "0.2"), "without MODEL"),
        (("eval", "zoo:resnet", "--text", "text.txt"), "no tokenizer"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(run, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    code, out, error = run(*arguments)

    assert code == 2 and out == ""
    assert message in error and "Traceback" not in error


def test_debug_shows_where_an_error_came_from(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fasp-graph", "inspect", "zoo:nothing", "--debug"])

    with pytest.raises(fg.FaspGraphError):
        cli.main()


def test_text_windows_spread_over_the_file(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefgh" * 8)

    def tokenizer(text, **_):
        return {"input_ids": [ord(letter) for letter in text]}

    rows = data.text_windows(tmp_path / "text.txt", tokenizer, 10, 3)
    assert rows.shape == (3, 10) and rows[0, :3].tolist() == [97, 98, 99]
    batches = data.text_batches(tmp_path / "text.txt", tokenizer, 10, 6, batch=4)
    assert [len(batch) for batch in batches] == [4, 2]
    with pytest.raises(fg.FaspGraphError, match="longer text"):
        data.text_windows(tmp_path / "text.txt", tokenizer, 65)


def test_the_demo_measures_and_writes(tmp_path):
    target = data.load_target("zoo:llama-random")
    heldout = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    target = dataclasses.replace(target, heldout=heldout)

    rows = demo.run_demo(tmp_path, Console(quiet=True), target, sparsities=(0.3,), repeats=2)

    assert [row.name for row in rows] == ["dense", "30%"]
    assert set(rows[1].perplexity) == set(demo.VARIANTS)
    assert rows[1].parameters < rows[0].parameters and rows[1].flops < rows[0].flops
    assert rows[1].verify_max_error < 1e-9
    assert json.loads((tmp_path / "demo.json").read_text())["rows"][1]["latency"]["onnx"]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("demo.json", "graph.html", "llama-random-30", "llama-random-30.onnx")
    }
    assert fg.perplexity(fg.load(tmp_path / "llama-random-30"), heldout) == pytest.approx(
        rows[1].perplexity["fasp"], rel=1e-5
    )
    assert demo.table(rows).row_count == 2
