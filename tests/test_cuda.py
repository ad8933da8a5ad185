"""On a GPU: the same plan as on the CPU, the same answer twice, results that can be used."""

import copy

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import fasp_graph as fg
import models_zoo
from fasp_graph.evaluate import perplexity
from fasp_graph.exports.onnx import onnx_session, run_session
from passes.observe import add_gram, mirror, summable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TRAINED = ("llama", "opt")


def pruned_on(device, name, dtype=torch.float32, **options):
    """A zoo model pruned on a device, on calibration data that lie on the CPU."""
    entry = models_zoo.load(name)
    model = copy.deepcopy(entry.model).to(device, dtype)
    data = list(entry.calibration) or [entry.inputs]
    held = pytree.tree_map(
        lambda v: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v,
        (entry.inputs, data),
    )
    return fg.prune(model, held[0], held[1], fg.Config(**options))


@pytest.mark.parametrize("name", models_zoo.names())
@pytest.mark.parametrize("method", ["fasp", "best"])
def test_zoo_models_are_pruned_and_verified(name, method):
    pruned = pruned_on("cuda", name, method=method)
    assert all(p.is_cuda for p in pruned.graph_module.parameters())
    assert all(p.is_cuda for p in pruned.model.parameters())
    assert pruned.report.verify_max_error < 1e-9


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("method", ["fasp", "best"])
def test_the_result_is_that_of_the_cpu(name, method):
    here, there = (pruned_on(d, name, method=method) for d in ("cpu", "cuda"))
    heldout = models_zoo.load(name).heldout[:16]
    left, right = perplexity(here.model, heldout), perplexity(there.model, heldout)
    assert right == pytest.approx(left, rel=0.02)
    same = [len(set(a) & set(b)) / len(a) for a, b in _plans(here, there)]
    assert sum(same) / len(same) > 0.9


def _plans(here, there):
    """Kept units of each group; `best` may spread a few of them otherwise."""
    return [(units, there.plan.kept[name]) for name, units in here.plan.kept.items()]


@pytest.mark.parametrize("method", ["fasp", "best"])
def test_two_runs_give_the_same_bits(method):
    runs = [pruned_on("cuda", "llama", method=method) for _ in range(2)]
    assert runs[0].plan == runs[1].plan
    weights = [run.graph_module.state_dict() for run in runs]
    assert all(torch.equal(held, weights[1][name]) for name, held in weights[0].items())


def test_half_precision_sums_are_those_of_float32():
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        rows = torch.randn(512, 200, device="cuda").to(dtype)
        assert summable(rows) is rows
        gram = torch.zeros(200, 200, device="cuda")
        add_gram(gram, rows)
        add_gram(gram, rows)
        mirror(gram)
        exact = 2 * rows.double().T @ rows.double()
        assert float((gram - exact).abs().max() / exact.abs().max()) < 4e-6  # float32


@pytest.mark.parametrize("name", TRAINED)
def test_half_precision_models(name):
    pruned = pruned_on("cuda", name, torch.bfloat16, method="fasp", sparsity=0.2)
    heldout = models_zoo.load(name).heldout[:16]
    wide = pruned_on("cuda", name, method="fasp", sparsity=0.2)
    assert perplexity(pruned.model, heldout) < 1.1 * perplexity(wide.model, heldout)


def test_inputs_on_the_cpu_follow_the_model():
    entry = models_zoo.load("llama")
    deps = fg.analyze(copy.deepcopy(entry.model).cuda(), entry.inputs)
    assert deps.groups


def test_max_memory_gives_the_same_plan():
    wide = pruned_on("cuda", "llama", method="fasp")
    narrow = pruned_on("cuda", "llama", method="fasp", max_memory=2_000_000)
    assert narrow.plan == wide.plan


def test_folders_and_onnx_files_from_the_gpu(tmp_path):
    pruned = pruned_on("cuda", "llama", method="fasp")
    tokens = models_zoo.load("llama").heldout[:2]
    expected = pruned.model(tokens.cuda()).logits.detach().cpu()
    loaded = fg.load(fg.save(pruned, tmp_path / "folder"))
    torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-3, atol=1e-3)
    path = pruned.export_onnx(tmp_path / "model.onnx")
    (logits,) = run_session(onnx_session(path), ((tokens,), {}))[:1]
    torch.testing.assert_close(torch.as_tensor(logits), expected, rtol=1e-3, atol=1e-3)


def test_a_convolution_network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2)
    )
    model = model.cuda().eval()
    batches = [torch.randn(4, 3, 12, 12) for _ in range(8)]
    pruned = fg.prune(model, batches[0], batches, fg.Config(sparsity=0.4))
    assert pruned.report.verify_max_error < 1e-9


def test_recovery_on_the_gpu():
    pytest.importorskip("peft")
    pruned = pruned_on("cuda", "llama", method="magnitude", sparsity=0.3)
    entry = models_zoo.load("llama")
    heldout = entry.heldout[:16]
    before = perplexity(pruned.model, heldout)
    recovered = fg.recover(pruned, list(entry.calibration), distill=entry.model, tokens=60_000)
    assert perplexity(recovered.model, heldout) < before


@pytest.mark.parametrize("options", [{}, {"restore": "residual"}, {"max_memory": 2_000_000}])
def test_weights_on_the_host_are_computed_with_on_the_gpu(options):
    several = tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    here = pruned_on("cpu", "llama", method="fasp", **options)
    there = pruned_on("cpu", "llama", method="fasp", compute_on=several, **options)
    assert all(not p.is_cuda for p in there.model.parameters())
    assert torch.cuda.max_memory_allocated() > 0
    heldout = models_zoo.load("llama").heldout[:16]
    left, right = perplexity(here.model, heldout), perplexity(there.model, heldout)
    assert right == pytest.approx(left, rel=0.02)
    same = [len(set(a) & set(b)) / len(a) for a, b in _plans(here, there)]
    assert sum(same) / len(same) > 0.9


def test_values_go_to_the_host_and_come_back():
    whole = pruned_on("cuda", "llama", method="fasp")
    bound = pruned_on("cuda", "llama", method="fasp", max_memory=2_000_000)
    same = [len(set(a) & set(b)) / len(a) for a, b in _plans(whole, bound)]
    assert sum(same) / len(same) > 0.95 and bound.report.verify_max_error < 1e-9


def test_a_folder_is_streamed_to_the_gpu(tmp_path):
    entry = models_zoo.load("llama")
    entry.model.save_pretrained(tmp_path / "dense")
    data = list(entry.calibration)
    config = fg.Config(method="fasp", compute_on=("cuda",))
    found = fg.prune_folder(tmp_path / "dense", entry.inputs, data, config, tmp_path / "out")
    plain = fg.prune(entry.model, entry.inputs, data, fg.Config(method="fasp"))
    same = [len(set(a) & set(b)) / len(a) for a, b in _plans(plain, found)]
    assert sum(same) / len(same) > 0.9
