"""What can be done with a result: folder, ONNX, viewer, perplexity, generation."""

import decoding
import pytest
import torch
from programs_of_zoo import program
from torch import nn

import fasp_graph as fg
import models_zoo
from fasp_graph.pages.view import to_html
from passes.capture import as_args
from passes.compare import tensors


def pruned(name, **options):
    entry, known = program(name)
    config = fg.Config(**options)
    return entry, fg.prune(entry.model, entry.inputs, entry.calibration, config, program=known)


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


@pytest.mark.xdist_group("llama-random")
def test_a_result_says_what_it_is_in_a_line():
    _, result = pruned("llama-random", method="magnitude")

    before, after = result.report.params_before, result.report.params_after
    said = f"4 groups pruned, parameters {before:,} -> {after:,}, {result.report.sparsity:.1%}"
    assert repr(result) == f"Pruned(LlamaForCausalLM: {said} of those in scope removed)"


@pytest.mark.xdist_group("llama-random")
def test_modes_and_frozen_weights_stay_the_users():
    dense = models_zoo.load("llama-random").model.train()
    dense.model.layers[1].eval()
    dense.model.layers[0].requires_grad_(False)
    entry = program("llama-random")[0]

    small = fg.prune(dense, entry.inputs, None, fg.Config(0.3, method="magnitude")).model

    for model in (dense, small):
        modes = {path: module.training for path, module in model.named_modules()}
        assert all(mode == ("layers.1" not in path) for path, mode in modes.items())
        trained = {name: p.requires_grad for name, p in model.named_parameters()}
        assert all(held == ("layers.0" not in name) for name, held in trained.items())


class Divided(nn.Module):
    """Reads a width that pruning changes, which shows in numbers that are not zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 16, bias=False), nn.Linear(16, 3, bias=False)

    def forward(self, x):
        h = torch.relu(self.up(x))
        return self.down(h / h.shape[-1])


def test_the_class_is_tried_at_other_inputs_than_the_example():
    config = fg.Config(0.3, method="magnitude")
    result = fg.prune(Divided().eval(), torch.zeros(4, 6), None, config)

    assert result.emission.ways == {"up.0": "adapter"}
    x = torch.randn(5, 6)
    assert torch.allclose(outputs(result.model, x), outputs(result.graph_module, x), atol=1e-6)


@pytest.mark.xdist_group("llama-random")
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


@pytest.mark.xdist_group("resnet")
def test_a_plain_module_loads_into_the_callers_instance(tmp_path):
    entry, result = pruned("resnet")
    folder = result.save(tmp_path / "small")

    loaded = fg.load(folder, models_zoo.load("resnet").model)

    expected = outputs(result.model, entry.inputs)
    assert torch.allclose(outputs(loaded.eval(), entry.inputs), expected, atol=1e-6)
    with pytest.raises(fg.FaspGraphError):
        fg.load(folder)


@pytest.mark.xdist_group("llama-random")
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


@pytest.mark.xdist_group("llama")
def test_repair_helps_the_trained_models_on_heldout_text():
    entry, known = program("llama")
    rows = entry.heldout[:12]

    def after(**options):
        config = fg.Config(sparsity=0.3, **options)
        batches = entry.calibration[:1]
        small = fg.prune(entry.model, entry.inputs, batches, config, program=known).model
        return fg.perplexity(small, rows)

    dense, fasp = fg.perplexity(entry.model, rows), after(method="fasp")
    assert dense < fasp < after(method="fasp", restore="none") < after(method="magnitude")


@pytest.mark.xdist_group("llama-random")
def test_a_lack_of_memory_is_not_taken_for_a_class_that_cannot(monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4 bytes")

    monkeypatch.setattr("fasp_graph.emit.modules.apart", full)

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        pruned("llama-random", method="magnitude")


def test_each_module_stays_in_its_mode(tmp_path):
    dense, inputs, batches = decoding.llama()
    config = fg.Config(0.3, method="magnitude", layout="uniform")
    pruned = fg.prune(dense, inputs, None, config)
    model = pruned.model.train()
    model.lm_head.eval()
    modes = {path: module.training for path, module in model.named_modules()}

    fg.save(pruned, tmp_path / "small")
    fg.export(pruned, tmp_path / "small.onnx", cache=True)
    fg.perplexity(model, decoding.windows())

    assert {path: module.training for path, module in model.named_modules()} == modes
    pytest.importorskip("peft")
    trained = fg.recover(pruned, batches, tokens=200).model
    assert {path: module.training for path, module in trained.named_modules()} == modes
