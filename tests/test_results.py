"""What can be done with a result: folder, ONNX, viewer, perplexity, generation."""

import json
import subprocess
import sys

import onnx
import pytest
import torch
from torch import nn

import fasp_graph as fg
import models_zoo
from fasp_graph.exports.onnx import onnx_session, run_session
from fasp_graph.pages.view import to_html
from passes.capture import as_args, tensors


def pruned(name, **options):
    entry = models_zoo.load(name)
    return entry, fg.prune(entry.model, entry.inputs, entry.calibration, fg.Config(**options))


def outputs(model, inputs):
    args = as_args(inputs)
    with torch.no_grad():
        return tensors(model(*args[0], **args[1]))[0]


@pytest.mark.parametrize("name", [n for n in models_zoo.names() if n not in ("llama", "opt")])
def test_the_users_class_equals_the_graph(name):
    entry, result = pruned(name)

    graph = outputs(result.graph_module, entry.inputs)
    assert type(result.model) is type(entry.model)
    assert torch.allclose(outputs(result.model, entry.inputs), graph, atol=1e-5)
    assert result.report.params_after < result.report.params_before
    assert result.report.flops_after < result.report.flops_before


@pytest.mark.parametrize("name", ["llama-random", "opt-random", "gpt2", "bert"])
def test_a_saved_folder_loads_in_a_fresh_process(name, tmp_path):
    entry, result = pruned(name)

    folder = result.save(tmp_path / "small")

    torch.save(entry.inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch, fasp_graph as fg; model = fg.load(sys.argv[1]).eval();"
        "inputs = torch.load(sys.argv[2]); out = model(**inputs)[0]; torch.save(out, sys.argv[3])"
    )
    arguments = [str(folder), str(tmp_path / "inputs.pt"), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
    expected = outputs(result.model, entry.inputs)
    assert torch.allclose(torch.load(tmp_path / "out.pt"), expected, atol=1e-6)
    assert json.loads((folder / "fasp_graph.json").read_text())


def test_altered_weights_and_foreign_folders_are_refused(tmp_path):
    _, result = pruned("llama-random")
    folder = result.save(tmp_path / "small")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)

    with pytest.raises(fg.FaspGraphError):
        fg.load(folder)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(fg.FaspGraphError):
        result.save(tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_plain_module_loads_into_the_callers_instance(tmp_path):
    entry, result = pruned("resnet")
    folder = result.save(tmp_path / "small")

    loaded = fg.load(folder, models_zoo.load("resnet").model)

    expected = outputs(result.model, entry.inputs)
    assert torch.allclose(outputs(loaded.eval(), entry.inputs), expected, atol=1e-6)
    with pytest.raises(fg.FaspGraphError):
        fg.load(folder)


@pytest.mark.parametrize("name", ["llama-random", "opt-random", "resnet"])
def test_onnx_runtime_agrees_at_other_sizes(name, tmp_path):
    entry, result = pruned(name)

    path = result.export_onnx(tmp_path / "small.onnx")

    onnx.checker.check_model(str(path))
    inputs = entry.calibration[0]
    if isinstance(inputs, dict):
        inputs = {"input_ids": torch.randint(3, 101, (5, 17))}
    else:
        inputs = torch.randn(5, *inputs.shape[1:])
    found = run_session(onnx_session(path), as_args(inputs))[0]
    assert torch.allclose(found, outputs(result.graph_module, inputs), atol=1e-4)


def test_generate_trains_and_copies():
    entry, result = pruned("llama-random")
    model, prompt = result.model, entry.inputs["input_ids"][:, :5]

    with torch.no_grad():
        text = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True)
        plain = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(text, plain)
    model.train()
    model(prompt, labels=prompt).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_viewer_escapes_names(tmp_path):
    model = nn.Sequential()
    model.add_module("</script><b>x", nn.Linear(4, 6))
    model.add_module("out", nn.Linear(6, 3))

    page = to_html(fg.analyze(model, torch.randn(3, 4)), tmp_path / "graph.html").read_text()

    assert "</script><b>x" not in page
    assert page.count("<script") == page.count("</script>")


def test_repair_helps_the_trained_models_on_heldout_text():
    entry = models_zoo.load("llama")
    rows = entry.heldout[:24]

    def after(**options):
        config = fg.Config(sparsity=0.3, **options)
        small = fg.prune(entry.model, entry.inputs, entry.calibration[:2], config).model
        return fg.perplexity(small, rows)

    dense, fasp = fg.perplexity(entry.model, rows), after(method="fasp")
    assert dense < fasp < after(method="fasp", restore="none") < after(method="magnitude")


def test_the_command_line(tmp_path):
    run = [sys.executable, "-m", "fasp_graph.cli"]
    inspect = subprocess.run([*run, "inspect", "zoo:gpt2"], capture_output=True, text=True)
    assert inspect.returncode == 0 and "bilinear" in inspect.stdout
    prune = subprocess.run(
        [*run, "prune", "zoo:opt-random", "--output", str(tmp_path / "small"), "--json"],
        capture_output=True,
        text=True,
    )
    assert prune.returncode == 0, prune.stderr
    assert (tmp_path / "small" / "fasp_graph.json").exists()
    wrong = subprocess.run([*run, "prune", "zoo:nothing"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "gpt2" in wrong.stderr and "Traceback" not in wrong.stderr


def test_the_bundled_models_are_far_below_a_unigram_model():
    for name in ("llama", "opt"):
        facts = json.loads((models_zoo.pretrained.DATA / name / "training.json").read_text())
        entry = models_zoo.load(name)
        assert fg.perplexity(entry.model, entry.heldout[:24]) < 0.1 * facts["unigram_perplexity"]
        size = (models_zoo.pretrained.DATA / name / "model.safetensors").stat().st_size
        assert size < 8e6


def test_the_zoo_names_what_it_has():
    with pytest.raises(KeyError, match="gpt-neox"):
        models_zoo.load("nothing")


def test_the_wheel_prunes_in_an_empty_folder(tmp_path):
    from pathlib import Path

    root = Path(__file__).parent.parent
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "-w", str(tmp_path / "wheel"), str(root)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    place = tmp_path / "place"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(place), str(wheel)], check=True)
    code = (
        "import fasp_graph as fg, models_zoo as zoo; e = zoo.load('opt');"
        "p = fg.prune(e.model, e.inputs, None, fg.Config(method='magnitude'));"
        "print(fg.__file__, p.report.params_after < p.report.params_before)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(place), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout.split()[-2].startswith(str(place)) and found.stdout.endswith("True\n")
