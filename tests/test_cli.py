"""The command line, called in this process."""

import dataclasses
import io
import json
import sys
from types import SimpleNamespace

import decoding
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.fx import symbolic_trace
from transformers import AutoConfig

import fasp_graph as fg
from fasp_graph import bench, data
from fasp_graph.commands import demo, dryrun, inspecting, pruning
from fasp_graph.exports.onnx import write_graph
from fasp_graph.targets import Target

PERPLEXITIES = ("perplexity_before", "perplexity_after")


def test_flags_are_the_fields_of_config(run):
    code, out, _ = run("prune", "--help")

    assert code == 0
    for field in dataclasses.fields(fg.Config):
        assert f"--{field.name.replace('_', '-')}" in out


def test_inspect(run, tmp_path):
    code, out, _ = run("inspect", "zoo:opt-random", "--json", "--html", tmp_path / "graph.html")

    assert code == 0
    assert {"chain", "frozen"} <= {group["kind"] for group in json.loads(out)["groups"]}
    assert (tmp_path / "graph.html").is_file()


def test_prune_eval_and_export_a_folder(run, tmp_path):
    folder = tmp_path / "small"
    code, out, error = run(
        *("prune", "decoding:llama", "--sparsity", 0.4, "--method", "magnitude", "--json"),
        *("--output", folder),
    )
    assert code == 0, error
    report = json.loads(out)

    code, out, error = run("eval", folder, "--json")
    assert code == 0, error
    found = json.loads(out)
    assert found["parameters"] == report["params_after"] < report["params_before"]
    assert found["inputs"] == report["inputs"] == report["latency_inputs"] == "input_ids [3, 11]"
    assert found["flops"] == report["flops_after"] and found["latency_ms"] > 0
    code, _, error = run("export", folder, tmp_path / "other")
    assert code == 2 and "other must end in .onnx · help: other.onnx" in error

    code, out, error = run(
        *("export", folder, tmp_path / "small.onnx", "--cache", "--dtype", "float16", "--json"),
        *("--external-data-bytes", 1000, "--data", "decoding:windows", "--windows", 2),
    )
    assert code == 0, error
    found = json.loads(out)
    held = [tmp_path / name for name in ("small.onnx", "small.onnx.data")]
    assert found["bytes"] == sum(path.stat().st_size for path in held)
    assert found["cache_bytes"] < found["dense_cache_bytes"]
    tokens = decoding.windows()[:2]
    assert found["perplexity"] == pytest.approx(fg.perplexity(fg.load(folder), tokens), rel=0.01)

    code, out, error = run("export", folder, tmp_path / "small.pt2", "--format", "pt2", "--json")
    assert code == 0, error
    program = torch.export.load(tmp_path / "small.pt2").module()
    logits = program(input_ids=tokens)["logits"]
    torch.testing.assert_close(logits, fg.load(folder)(tokens).logits)


@pytest.mark.parametrize("form", ["json", "dot", "graphml", "mermaid", "svg"])
def test_inspect_prints_and_writes_every_format(run, tmp_path, form):
    code, out, error = run("inspect", "plain:several", "--format", form)
    assert code == 0, error

    assert run("inspect", "plain:several", "--output", tmp_path / f"graph.{form}")[0] == 0
    assert (tmp_path / f"graph.{form}").read_text() == out and "middle" in out


def test_inspect_tells_in_words(run):
    code, out, _ = run("inspect", "zoo:resnet", "--frozen")
    assert code == 0 and "frozen" in out and "layer1.0.conv1.0" in out

    explained = ("inspect", "zoo:resnet", "--explain", "layer1.0.conv1.weight")
    code, out, _ = run(*explained)
    assert code == 0 and "goes with: " in out
    found = json.loads(run(*explained, "--json")[1])
    assert found["explanation"] == out.rstrip("\n") and found["shape"]
    names = [group["name"] for group in found["groups"]]
    assert "layer1.0.conv1.0" in names and all(name in out for name in names)


def test_frozen_groups_are_listed_when_asked_for(run):
    plain, frozen = (run("inspect", "zoo:resnet", *more)[1] for more in ((), ("--frozen",)))

    assert "frozen" not in plain and "reason" not in plain
    assert "frozen" in frozen and "reaches" in frozen


def test_a_dry_run_says_what_pruning_then_does(run, tmp_path):
    asked = ("prune", "zoo:resnet", "--sparsity", 0.4, "--method", "fasp")
    code, out, error = run(*asked, "--dry-run", "--json", "--output", tmp_path / "none")
    assert code == 0, error
    plan = json.loads(out)
    assert not (tmp_path / "none").exists()

    report = json.loads(run(*asked, "--json")[1])

    assert plan["params_after"] == report["params_after"]
    assert plan["sparsity"] == pytest.approx(report["sparsity"])
    kept = {group["name"]: group["kept"] for group in report["groups"]}
    assert plan["keep"].keys() == kept.keys() and plan["expected_seconds"] > 0
    words = run(*asked, "--dry-run")[1]
    assert 0 < plan["removed"] == report["removed"]
    assert f"{plan['removed']:.1%} of all and {plan['sparsity']:.1%} of those in scope" in words
    assert plan["exact"] and "Plan, nothing pruned" in words and "a run keeps other" not in words


def test_a_dry_run_says_where_a_run_keeps_others(run):
    asked = ("prune", "plain:several", "--dry-run", "--method", "best")

    assert json.loads(run(*asked, "--json")[1])["exact"] is False
    words = " ".join(run(*asked)[1].split())
    assert "a run keeps other numbers of each group" in words and "allocation=sensitivity" in words


@pytest.mark.parametrize("method", ["best", "fasp", "flap", "magnitude"])
def test_a_dry_run_expects_the_passes_that_a_run_takes(run, monkeypatch, method):
    clock = iter(range(100))  # every look at the clock is a second after the one before
    monkeypatch.setattr(dryrun, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    asked = ("prune", "decoding:llama", "--method", method, "--json")

    plan = json.loads(run(*asked, "--dry-run")[1])

    report = json.loads(run(*asked)[1])
    passes = plan["forward_passes"]
    assert passes == report["forward_passes"]
    batches = len(data.load_target("decoding:llama").calibration)
    deciding = plan["expected_seconds"] - 2  # capture and couple, and as much again
    assert deciding == 0 if method == "magnitude" else 0 < deciding - batches * passes < batches


def little():
    """A model, its inputs, and fewer calibration samples than its layers have channels."""
    torch.manual_seed(0)
    layers = [nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)]
    return nn.Sequential(*layers), torch.randn(2, 3), [torch.randn(5, 3)]


def test_too_little_calibration_is_one_warning_beside_the_result(run):
    code, out, error = run("prune", "test_cli:little", "--method", "fasp", "--json")

    assert code == 0, error
    assert error.count("warning") == 1 and "1 more like it in the report" in error
    assert "few samples: 5 calibration samples for the 8 channels that enter 2.weight" in error
    assert len(json.loads(out)["notes"]) == 2


def test_options_from_a_file_are_overruled_by_flags(run, tmp_path):
    file = tmp_path / "options.toml"
    file.write_text('sparsity = 0.2\nmethod = "magnitude"\nmin-keep = 3\nkinds = ["chain"]\n')

    asked = ("prune", "plain:several", "--config", file, "--json")
    low = json.loads(run(*asked)[1])["sparsity"]
    high = json.loads(run(*asked, "--sparsity", 0.5)[1])["sparsity"]

    assert low == pytest.approx(0.2, abs=0.05) and high == pytest.approx(0.5, abs=0.05)


def test_prune_writes_a_report_and_a_picture(run, tmp_path):
    folder = tmp_path / "small"
    code, out, error = run(
        *("prune", "zoo:llama-random", "--output", folder, "--seed", 1, "--score", "magnitude"),
        *("--restore", "none", "--ridge", 0.1, "--kinds", "chain", "--no-check"),
    )
    assert code == 0, error
    assert "latency ms after" in out

    report = json.loads((folder / "report.json").read_text())
    assert report["params_after"] < report["params_before"]
    asked = report["asked"]
    assert (asked["seed"], asked["score"], asked["ridge"]) == (1, "magnitude", 0.1)
    assert asked["calibration data"].startswith("that of llama-random") and asked["versions"]
    assert json.loads((folder / "fasp_graph.json").read_text())["config"]["seed"] == 1
    page = (folder / "report.html").read_text()
    assert "<script" not in page and f"{report['params_after']:,}" in page
    assert all(group["name"].rsplit(".", 1)[0] in page for group in report["groups"])
    assert report["frozen"]  # those of all layers in one row
    assert all(frozen["name"].split(".")[-2] in page for frozen in report["frozen"])
    assert (folder / "graph.html").stat().st_size > 100_000
    fg.load(folder)
    again = run(  # into the same folder
        *("prune", "zoo:llama-random", "--output", folder, "--layout", "uniform", "--align", 4),
        *("--allocation", "uniform", "--min-keep", 2, "--max-memory", 10**8),
    )
    assert again[0] == 0, again[2]
    assert AutoConfig.from_pretrained(folder).model_type == "llama"  # what layout uniform is for
    frozen = json.loads((folder / "report.json").read_text())["frozen"]
    reasons = {(held["kind"], held["reason"]) for held in frozen}
    assert ("chain", "layout=uniform: no field of the configuration says its size") in reasons
    assert ("head", "not asked for") in reasons


def test_a_foreign_folder_is_refused_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning, "load_target", None)  # would be work
    (tmp_path / "notes.txt").write_text("mine")

    code, _, error = run("prune", "zoo:llama-random", "--output", tmp_path)

    assert code == 2 and "no fasp_graph folder" in error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_ending_says_the_format(run, tmp_path):
    path = tmp_path / "small.pt2"

    code, _, error = run("export", "zoo:kan", path)

    assert code == 0, error
    assert torch.export.load(path).graph_signature.user_outputs


def test_eval_says_how_it_measured(run, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("def area(radius):\n    return 3.14 * radius ** 2\n" * 40)
    asked = ("--data", text, "--length", 32, "--windows", 3, "--json")

    code, out, error = run("eval", "zoo:llama", *asked, "--stride", 16)
    assert code == 0, error
    found = json.loads(out)
    assert (found["stride"], found["sequence_length"], found["samples"]) == (16, 32, 3)

    code, out, error = run("eval", "zoo:llama", *asked, "--reference", "zoo:llama")
    assert code == 0, error
    assert json.loads(out)["embedding_similarity"] == pytest.approx(1.0)

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, error = run("eval", "zoo:llama", "--task", "arc_easy", "--limit", 1)
    assert code == 2 and "fasp-graph[evaluation]" in error


def test_bench_compares_alike(run, tmp_path):
    folder = tmp_path / "small"
    asked = ("prune", "decoding:llama", "--method", "magnitude", "--output", folder)
    assert run(*asked)[0] == 0

    code, out, error = run(
        *("bench", "decoding:llama", folder, "--runs", 2, "--length", 24, "--batch", 2),
        *("--no-memory", "--json"),
    )

    assert code == 0, error
    rows = json.loads(out)
    assert [row["runtime"] for row in rows] == ["torch", "onnxruntime"] * 2
    assert rows[0]["parameters"] > rows[2]["parameters"] and rows[0]["flops"] > rows[2]["flops"]
    assert rows[0]["tokens_per_second"] == pytest.approx(2 * 24 / rows[0]["median"])
    assert "onnxruntime" not in run("bench", folder, "--runs", 2, "--no-onnx", "--no-memory")[1]


def test_peak_memory_is_of_a_fresh_process(monkeypatch):
    weights = 4 * 2_755_008

    assert bench.peak_memory("zoo:llama", 1, 8) > weights
    monkeypatch.setattr(bench.sys, "executable", "ls")  # fails, and says at what
    with pytest.raises(
        fg.FaspGraphError, match="(?s)measuring the memory of zoo:none failed: .*zoo:none"
    ):
        bench.peak_memory("zoo:none", 1, 8)


def test_peak_memory_is_what_comes_on_top_of_the_process(monkeypatch):
    seen, steps = iter([700, 1000]), []
    monkeypatch.setattr(bench.peaks, "restart", lambda: steps.append("restart"))
    monkeypatch.setattr(bench.peaks, "peak_host", lambda: next(seen))

    assert bench._grown(lambda: steps.append("run")) == 300
    assert steps == ["restart", "run"]


def test_a_session_has_a_peak_of_memory_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2000, 2000), nn.ReLU(), nn.Linear(2000, 2000))

    eager, session = bench.bench([Target("heavy", model, torch.randn(2, 2000))], runs=2)

    assert (eager.runtime, session.runtime) == ("torch", "onnxruntime")
    assert 32e6 < session.bytes < session.peak_memory < 9 * session.bytes
    assert eager.peak_memory is None  # of a model without a name no other process loads it


def test_a_device_is_chosen_or_refused_with_a_reason(run):
    one = ("--device", "cpu", "--json")
    code, out, error = run("eval", "decoding:llama", *one)
    assert code == 0 and json.loads(out)["parameters"], error
    short = ("--runs", 2, "--length", 8, "--no-onnx", "--no-memory")
    assert run("bench", "decoding:llama", *short, *one)[0] == 0
    code, _, error = run("prune", "plain:several", "--method", "fasp", "--compute-on", "cpu", *one)
    assert code == 0, error
    for device, reason in (
        ("cuda:77", "device 'cuda:77' cannot be used"),
        ("meta", "holds no numbers"),
        ("gpu", "device 'gpu' cannot be used"),
    ):
        code, _, error = run("eval", "decoding:llama", "--device", device)
        assert code == 2 and reason in error and "help: cpu, " in error
    streamed = ("prune", "decoding:llama", "--stream", "--method", "fasp")
    code, _, error = run(*streamed, "--device", "cuda")
    assert code == 2 and "help: --compute-on cuda" in error


@pytest.mark.parametrize(
    "words",
    ["inspect", "prune", "eval", "eval x --reference", "bench x", "export", "recover x --distill"],
)
def test_a_shell_is_offered_the_zoo_where_a_model_stands(run, monkeypatch, words):
    line = f"fasp-graph {words} zoo:re"
    monkeypatch.setenv("_FASP_GRAPH_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))

    code, out, _ = run()

    assert code == 0 and "zoo:resnet" in out.split()
    assert all(word.startswith("zoo:re") for word in out.split())


def test_completion_is_shown_and_installed(run, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("shellingham.detect_shell", lambda *_, **__: ("bash", "/bin/bash"))

    code, out, _ = run("--show-completion")
    assert code == 0 and "_FASP_GRAPH_COMPLETE=complete_bash" in out

    assert run("--install-completion")[0] == 0
    assert "fasp-graph" in (tmp_path / ".bashrc").read_text()


def test_a_factory(run, tmp_path, monkeypatch):
    (tmp_path / "my_factory.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    model = torch.nn.Sequential(\n"
        "        torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 2))\n"
        "    return model, torch.randn(4, 6), [torch.randn(32, 6)]\n"
        "def more():\n"
        "    return [torch.randn(8, 6)]\n"
    )
    monkeypatch.chdir(tmp_path)

    code, out, error = run("prune", "my_factory:build", "--json", "--output", "small")

    assert code == 0, error
    report = json.loads(out)
    assert report["verify_max_error"] < 1e-9
    code, _, error = run("eval", "small")
    assert code == 2 and "small@package.module:factory" in error
    small = "small@my_factory:build"
    code, out, error = run("eval", small, "--json")
    assert code == 0, error
    assert json.loads(out)["parameters"] == report["params_after"]
    code, out, error = run("export", small, "small.onnx", "--json")
    assert code == 0, error
    code, _, error = run(
        *("recover", small, "--data", "my_factory:more", "--distill", "my_factory:build"),
        *("--lora", 0, "--output", tmp_path / "better"),
    )
    assert code == 0, error
    assert (tmp_path / "better" / "fasp_graph.json").is_file()


def test_a_card_names_no_path_of_this_machine(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    target = data.Target("small", torch.nn.Linear(2, 2), None, [None], source=str(tmp_path))

    facts = pruning._facts(target, str(texts), "wikitext2", dict.fromkeys(PERPLEXITIES, 2.0))

    assert facts["model"] == tmp_path.name
    assert facts["calibration data"] == "texts, 1 batch"
    assert facts["evaluation data"] == "wikitext2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "zoo:opt-randm"), "help: opt-random"),
        (("inspect", "no_such_package:build"), "cannot import"),
        (("inspect", "./no/such/folder"), "no folder ./no/such/folder"),
        (("prune", "zoo:resnet", "--sparsity", "7"), "sparsity=7.0"),
        (("prune", "zoo:resnet", "--method", "guess"), "best, fasp"),
        (("prune", "zoo:resnet", "--calibration", "text.txt"), "cannot read text.txt"),
        (("prune", "--sparsity", "0.2"), "without MODEL"),
        (("prune", "--dry-run", "--evaluation", "t.txt"), "--evaluation, --dry-run without MODEL"),
        (("prune", "--device", "cpu", "--stream"), "--stream, --device without MODEL"),
        (("inspect", "no_such_package:x"), "cannot import no_such_package:x: ModuleNotFound"),
        (("eval", "zoo:resnet", "--limit", "3"), "--limit counts samples of a task · help: --task"),
        (("eval", "zoo:resnet", "--stride", "3"), "and none is · help: --data TEXT, or leave"),
        (("prune", "zoo:resnet", "--config", "no.toml"), "cannot read no.toml"),
        (("inspect", "zoo:resnet", "--format", "png"), "json, dot, graphml, mermaid, svg"),
        (("inspect", "zoo:resnet", "--explain", "conv"), "close names"),
        (("inspect", "zoo:resnet", "--html", "no/such/graph.html"), "create it first"),
        (("bench", "zoo:resnet", "zoo:opt-random"), "cannot be compared"),
        (("eval", "zoo:resnet", "--data", "text.txt"), "cannot read text.txt"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(run, monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    code, out, error = run(*arguments)

    assert code == 2 and out == ""
    assert message in error and "Traceback" not in error


def test_a_usage_error_is_exit_code_2(run):
    code, _, error = run("prune", "zoo:resnet", "--no-such-flag")

    assert code == 2 and "--no-such-flag" in error


def test_an_error_inside_is_one_message_and_exit_code_1(run, monkeypatch):
    def broken(*_):
        raise KeyError("the inside")

    monkeypatch.setattr(inspecting, "analyze", broken)
    code, out, error = run("inspect", "zoo:resnet")

    assert code == 1 and out == ""
    assert "the inside" in error and "--debug" in error and "Traceback" not in error


def test_an_interrupt_is_exit_code_130(run, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspecting, "analyze", stopped)

    assert run("inspect", "zoo:resnet")[0] == 130


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "zoo:nothing", "--debug"),
        ("prune", "zoo:nothing", "--debug"),
        ("recover", "nothing", "--output", "better", "--debug"),
        ("eval", "zoo:nothing", "--debug"),
        ("bench", "zoo:nothing", "--debug"),
        ("export", "zoo:nothing", "x.onnx", "--debug"),
    ],
)
def test_debug_shows_where_an_error_came_from(run, words):
    code, _, error = run(*words)

    assert code == 2 and error.startswith("Traceback") and "nothing" in error.splitlines()[-1]


def test_debug_leaves_the_exit_code_of_an_error_inside(run, monkeypatch):
    monkeypatch.setattr(inspecting, "analyze", lambda *_: [][1])

    code, out, error = run("inspect", "zoo:resnet", "--debug")

    assert code == 1 and out == "" and error.endswith("IndexError: list index out of range\n")


def test_an_export_that_fails_in_its_process_is_told(tmp_path):
    inputs = ((torch.randn(2, 3),), {})
    threads = torch.get_num_threads()

    with pytest.raises(fg.FaspGraphError, match="none does not exist"), demo.exporter() as process:
        process.submit(
            write_graph, symbolic_trace(nn.Linear(3, 4)), inputs, None, tmp_path / "none/x.onnx"
        ).result()

    assert torch.get_num_threads() == threads


def test_the_demo_measures_and_writes(tmp_path):
    heldout = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    target = dataclasses.replace(data.load_target("decoding:llama"), name="tiny", heldout=heldout)

    rows = demo.run_demo(tmp_path, Console(quiet=True), target, sparsities=(0.3,), repeats=2)

    assert [row.name for row in rows] == ["dense", "30%"]
    assert set(rows[1].perplexity) == set(demo.VARIANTS)
    assert rows[1].parameters < rows[0].parameters and rows[1].flops < rows[0].flops
    assert rows[1].verify_max_error < 1e-9
    assert json.loads((tmp_path / "demo.json").read_text())["rows"][1]["latency"]["onnx"]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("demo.json", "graph.html", "tiny-30", "tiny-30.onnx")
    }
    assert fg.perplexity(fg.load(tmp_path / "tiny-30"), heldout) == pytest.approx(
        rows[1].perplexity["fasp"], rel=1e-5
    )
    assert demo.table(rows).row_count == 2
    narrow = Console(width=80, file=io.StringIO())
    narrow.print(demo.table(rows, narrow.width))
    printed = narrow.file.getvalue()
    assert "…" not in printed and all(heading in printed for heading in demo.HEADINGS)


def test_the_demos_columns_are_what_their_headings_say():
    def of(**options):
        return fg.Config(**options).passes

    ran = {name: of(**options) for name, options in demo.VARIANTS.items()}
    assert ran["fasp"] == of(method="fasp") and ran["best"] == of(method="best")
    assert ran["magnitude"] == of(method="magnitude")
    assert (ran["no_repair"].score, ran["no_repair"].restore) == ("fasp", "none")


def test_the_demo_takes_no_folder_of_others(run, tmp_path):
    kept = tmp_path / "thesis.txt"
    kept.write_text("mine")
    code, _, error = run("prune", "--output", tmp_path)
    assert code == 2 and "holds files of no earlier demo" in error and "help: --output" in error
    code, _, error = run("prune", "--output", kept)
    assert code == 2 and "is a file · help: --output names a folder" in error
    assert kept.read_text() == "mine" and [*tmp_path.iterdir()] == [kept]


def test_a_path_that_the_system_refuses_is_no_bug(run):
    code, _, error = run("prune", "zoo:resnet", "--method", "magnitude", "--output", "/proc/no/x")
    assert code == 2 and "/proc" in error and "this is a bug" not in error and "help:" in error
    code, _, error = run("export", "zoo:resnet", "/proc/x.onnx")
    assert code == 2 and "/proc cannot be written to" in error
