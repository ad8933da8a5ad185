"""What each command tells a person: the tables and lines, not their JSON."""

import dataclasses
import io
import json

import decoding
import pytest
import torch
from programs_of_zoo import program
from rich.console import Console
from transformers import AutoTokenizer

import fasp_graph as fg
from fasp_graph import bench
from fasp_graph.commands import measuring, pruning, recovering
from fasp_graph.commands.cells import share_tables
from fasp_graph.commands.listing import groups_table
from fasp_graph.commands.progress import progress_bar, staged
from fasp_graph.commands.terminal import said, wide_console
from fasp_graph.exports import export
from fasp_graph.scale.journal import work_folder
from fasp_graph.training import Training
from models_zoo.train import DATA

ROW = bench.Result(
    *("small", "torch", 1_234_567, 4_938_268, 2_500_000, 0.004, 0.0005, 250.0, 9, 7.5),
    *(1.25, (0.9, 1.5), "small in torch: its runs vary"),
)


def cells(out):
    """The cells of a table in print, row by row."""
    lines = [line.replace("┃", "│").strip("│") for line in out.splitlines()]
    return [[cell.strip() for cell in line.split("│")] for line in lines if "│" in line]


def lines(out):
    """`name: value` lines."""
    return dict(line.split(": ", 1) for line in out.splitlines() if ": " in line)


@pytest.mark.parametrize("more", [(), ("--no-resume",)])
def test_prune_keeps_a_journal_unless_told_not_to(run, tmp_path, monkeypatch, more):
    seen = []

    def prune(*_, work):
        seen.append(work)
        raise fg.FaspGraphError("enough · help: none")

    monkeypatch.setattr(pruning, "prune", prune)
    asked = ("prune", "decoding:llama", "--method", "magnitude", "--output", tmp_path / "small")

    assert run(*asked, *more)[0] == 2
    assert seen == [None if more else work_folder(tmp_path / "small")]


def test_prune_shows_what_each_layer_keeps(run, tmp_path):
    asked = ("prune", "zoo:llama-random", "--method", "magnitude", "--output", tmp_path / "small")
    out = run(*asked)[1]
    report = json.loads((tmp_path / "small/report.json").read_text())

    shares = [100 * held["kept"] / held["units"] for held in report["groups"][:2]]
    assert [row for row in cells(out) if len(row) == 3] == [
        ["kept share of", "self_attn.v_proj", "mlp.gate_proj"],
        ["model.layers.{0,1}", *(f"{int(share + 0.5)}%" for share in shares)],
    ]


def test_kept_shares_that_are_too_wide_are_several_tables():
    part = [f"net.{k}.part{n}.0" for k in range(3) for n in range(9)]
    groups = [{"name": name, "units": 8, "kept": n % 9} for n, name in enumerate(part)]
    console = Console(width=60, file=io.StringIO(), force_terminal=True, color_system="truecolor")

    tables = list(share_tables(groups, console.width))
    for table in tables:
        console.print(table)

    printed = console.file.getvalue()
    assert len(tables) == 2 and "…" not in printed and "net.{0..2}" in printed
    heads = [column.header for table in tables for column in table.columns]
    assert [h for h in heads if h != "kept share of"] == [f"part{n}" for n in range(9)]
    assert "\x1b[38;2;6;34;43;48;2;" in printed  # dark on a colour
    assert list(share_tables([], 80)) == []


def test_names_are_printed_as_they_are(capsys):
    wide_console().print(groups_table("net:x:", program("kan")[1].deps, False, 200))
    said("zoo:car:")
    bars = progress_bar(Console(file=io.StringIO(), force_terminal=True, width=80))
    with bars:
        staged(bars)("zoo[bold]: set up")
        bars.refresh()

    captured = capsys.readouterr()
    assert "net:x:" in captured.out and "zoo:car:" in captured.err
    assert "zoo[bold]: set up" in bars.console.file.getvalue()


def test_bench_puts_each_figure_under_its_heading(run, monkeypatch):
    monkeypatch.setattr(measuring, "bench", lambda *_: [ROW])

    code, out, error = run("bench", "zoo:kan")

    assert code == 0 and error == "warning: small in torch: its runs vary\n"
    assert dict(zip(*cells(out), strict=True)) == {
        **{"model": "small", "runtime": "torch", "parameters": "1,234,567", "weights": "4.9 MB"},
        **{"one call": "2.5 MFLOPs", "ms": "4.00", "± IQR": "0.50", "tokens/s": "250"},
        **{"times as fast": "1.25 (0.90-1.50)", "peak memory": "9 B", "perplexity": "7.500"},
    }


def test_bench_tells_short_calls_apart(run, monkeypatch):
    monkeypatch.setattr(measuring, "bench", lambda *_: [dataclasses.replace(ROW, median=4.26e-5)])

    heads, row = cells(run("bench", "zoo:kan")[1])

    assert dict(zip(heads, row, strict=True))["ms"] == "0.0426"


def test_bench_has_no_column_for_what_was_not_measured(run, monkeypatch):
    bare = dataclasses.replace(ROW, peak_memory=None, perplexity=None, speedup=None)
    monkeypatch.setattr(measuring, "bench", lambda *_: [bare, bare])

    heads, *rows = cells(run("bench", "zoo:kan")[1])

    assert not {"peak memory", "perplexity", "times as fast"} & set(heads)
    assert "tokens/s" in heads and rows[0] == rows[1]


def test_bench_runs_as_often_as_asked(run, monkeypatch):
    asked = []

    def rounds(calls, repeats):
        asked.append((repeats, torch.get_num_threads()))
        return {name: [0.25, 0.25, 0.25] for name in calls}

    monkeypatch.setattr(bench, "rounds", rounds)
    more = ("--runs", 7, "--threads", 2, "--no-onnx", "--no-memory", "--json")

    (row,) = json.loads(run("bench", "zoo:kan", *more)[1])

    assert asked == [(7, 2)] and (row["median"], row["spread"]) == (0.25, 0)
    assert row["speedup"] is row["warning"] is None


def test_prune_eval_and_export_in_words(run, tmp_path):
    folder, file = tmp_path / "small", tmp_path / "small.onnx"
    code, out, error = run("prune", "decoding:llama", "--method", "magnitude", "--output", folder)
    assert code == 0, error
    found = json.loads((folder / "report.json").read_text())
    assert f"parameters {found['params_before']:,} -> {found['params_after']:,}, " in out
    assert lines(out)["folder"] == str(folder)

    told = lines(run("eval", folder)[1])
    assert told["parameters"] == f"{found['params_after']:,}" and float(told["latency ms"]) > 0

    told = lines(run("export", folder, file, "--external-data-bytes", 1000)[1])
    assert told["path"] == str(file) and told["files"] == "small.onnx, small.onnx.data"
    assert 0 < float(told["max error"]) < 5e-4


def test_the_largest_error_of_an_export_is_the_one_that_was_seen(run, tmp_path, monkeypatch):
    seen = iter([0.0001, 0.0003, 0.0002])
    monkeypatch.setattr("fasp_graph.exports.packages.difference", lambda *_: next(seen, 0.0))

    told = json.loads(run("export", "zoo:kan", tmp_path / "kan.pt2", "--json")[1])

    assert told["max_error"] in (0.0001, 0.0003)


def test_inspect_zoo_and_a_dry_run_in_words(run):
    assert any("layer1.0.conv1.0" in row[0] for row in cells(run("inspect", "zoo:resnet")[1]))

    rows = {row[0]: row[1:] for row in cells(run("zoo")[1])}
    assert rows["model"] == ["class", "parameters"]
    assert rows["zoo:llama"] == ["LlamaForCausalLM", "2,755,008"]
    held = json.loads(run("zoo", "--json", "--debug")[1])
    assert [row["name"] for row in held] == [name for name in rows if name != "model"]

    asked = ("prune", "zoo:resnet", "--dry-run", "--method", "magnitude")
    plan = json.loads(run(*asked, "--json")[1])
    out = run(*asked)[1]
    rows = {row[0]: row[1:] for row in cells(out)}
    assert rows.pop("group") == ["units per block", "keeps"]
    assert rows == {name: [str(plan["sizes"][name]), str(n)] for name, n in plan["keep"].items()}
    assert f"{plan['params_before']:,} -> {plan['params_after']:,}" in out


def test_a_dry_run_tells_layers_that_repeat_in_one_row(run):
    rows = cells(run("prune", "zoo:llama-random", "--dry-run", "--method", "magnitude")[1])

    heads, *told = rows
    assert heads == ["group", "units per block", "keeps"] and len(told) == 2
    assert told[0][0] == "model.layers.{0,1}.self_attn.v_proj.0" and told[1][1] == "80"


@pytest.fixture
def reader(tmp_path):
    """The folder of a decoder of one layer, with a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "llama")
    decoding.llama(len(tokenizer))[0].save_pretrained(tmp_path / "reader")
    tokenizer.save_pretrained(tmp_path / "reader")
    return tmp_path / "reader"


def test_an_export_measures_on_windows_of_the_length_asked_for(run, reader, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "session_perplexity", lambda _, tokens: float(tokens.shape[1]))

    asked = ("export", reader, tmp_path / "llama.onnx", "--data", text(tmp_path))
    told = lines(run(*asked, "--length", 24, "--windows", 3)[1])

    assert told["perplexity"] == "24"


def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("def area(radius):\n    return 3.14 * radius ** 2\n" * 40)
    return file


def test_recover_trains_as_asked_and_says_so(run, reader, tmp_path, monkeypatch):
    asked = []
    train = recovering.train
    monkeypatch.setattr(
        recovering,
        "train",
        lambda model, batches, options, progress: (
            asked.append(dataclasses.replace(options, distill=None))
            or train(model, batches, options, progress)
        ),
    )
    code, _, error = run("prune", reader, "--method", "magnitude", "--output", tmp_path / "a")
    assert code == 0, error

    code, out, error = run(
        *("recover", tmp_path / "a", "--data", text(tmp_path), "--output", tmp_path / "b"),
        *("--tokens", 64, "--lora", 3, "--learning-rate", 0.02, "--seed", 5),
        *("--length", 32, "--windows", 4, "--evaluation", text(tmp_path)),
    )

    assert code == 0, error
    assert asked == [Training(64, 3, learning_rate=0.02, seed=5)]
    told = lines(out)
    assert told["folder"] == str(tmp_path / "b") and told["steps"] == "1"
    assert float(told["perplexity before"]) > 0 and float(told["loss first"]) > 0


@pytest.mark.parametrize("option", ["learning_rate", "seed", "lora"])
def test_each_option_of_recover_changes_the_result(option):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Linear(9, 2))
    data = [torch.randn(8, 6) for _ in range(4)]
    other = {"learning_rate": 1e-2, "seed": 1, "lora": 2}
    given = {"data": data, "tokens": 16, "distill": torch.nn.Linear(6, 2), "lora": 0}

    trained = [fg.recover(model, **given | more) for more in ({}, {}, {option: other[option]})]

    first, again, changed = (held[0].weight for held in trained)
    assert torch.equal(first, again) and not torch.equal(first, changed)
