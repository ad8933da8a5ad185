"""What is exported is the class as it is: trained, loaded, recovered, in another precision."""

import copy
from dataclasses import replace

import decoding
import families
import numpy as np
import onnx
import pytest
import torch
from families import EVERY, output
from torch import nn

import fasp_graph as fg
from fasp_graph.exports.onnx import onnx_session, run_session
from passes.compare import tensors
from passes.errors import FaspGraphError

pytestmark = pytest.mark.xdist_group("families")
FORMS = {"llama": "onnx pt2 cache", "phi3": "cache", "bert": "onnx", "t5": "pt2"}


def trained(model, inputs, steps=20):
    """`model` itself after some steps."""
    mode = model.training
    model.train()
    target = 2 * output(model, inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        (tensors(model(**inputs))[0] - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.train(mode)


def owned(name):
    """A result that may be changed."""
    found = families.pruned(name)
    return replace(found, model=copy.deepcopy(found.model))


def in_onnx_runtime(path, inputs):
    return run_session(onnx_session(path), ((), inputs))[0]


def with_cache(path, ids):
    session = onnx_session(path)
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    feed["position_ids"] = np.tile(np.arange(ids.shape[1]), (len(ids), 1))
    names = {entry.name for entry in session.get_inputs()}
    feed = {name: value for name, value in feed.items() if name in names}
    for entry in session.get_inputs():
        if entry.name.startswith("past"):
            sizes = [len(ids), *(n if isinstance(n, int) else 0 for n in entry.shape[1:])]
            feed[entry.name] = np.zeros(sizes, np.float16 if "16" in entry.type else np.float32)
    return torch.from_numpy(session.run(None, feed)[0])


def near(left, right, within=1e-4):
    scale = float(right.detach().abs().max())
    return float((left.double() - right.double()).abs().max()) < within * scale


@pytest.mark.parametrize(("name", "forms"), FORMS.items())
def test_prune_generate_save_load_train_export(name, forms, tmp_path):
    result, inputs = owned(name), EVERY[name].batch(3, 11)
    if EVERY[name].kind != "encoder":
        assert len(result.model.generate(**families.prompt(name), max_new_tokens=4)) == 2
    loaded = fg.load(result.save(tmp_path / "small"))
    assert torch.equal(output(loaded, inputs), output(result.model, inputs))
    before = output(result.model, inputs)

    trained(result.model, inputs)

    result.model.config.use_cache = True
    expected = output(result.model, inputs)
    assert not near(before, expected, 1e-2)
    if "onnx" in forms:
        fg.export_onnx(result, tmp_path / "a.onnx")
        assert near(in_onnx_runtime(tmp_path / "a.onnx", inputs), expected)
    if "pt2" in forms:
        fg.export(result, tmp_path / "a.pt2", "pt2")
        packed = torch.export.load(tmp_path / "a.pt2").module()
        assert near(output(packed, inputs), expected)
    if "cache" in forms:
        fg.export(result, tmp_path / "b.onnx", cache=True)
        assert near(with_cache(tmp_path / "b.onnx", inputs["input_ids"]), expected)
    again = fg.load(result.save(tmp_path / "small"))
    assert near(output(again, inputs), expected, 1e-6)


def test_the_graph_stands_on_the_weights_of_the_class():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 4))
    small = fg.prune(dense, torch.randn(3, 6), None, fg.Config(0.5, method="magnitude"))
    x = torch.randn(8, 6)

    with torch.no_grad():
        for parameter in small.model.parameters():
            parameter.mul_(2)

    assert torch.allclose(small.graph_module(x), small.model(x), atol=1e-5)
    small.model.half()  # other storage, and no surprise for the graph
    assert small.graph_module(x).dtype == torch.float32


@pytest.fixture
def small():
    """Trained batch statistics, and a linear layer whose input is cut."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    dense = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 4)).eval()
    return fg.prune(dense, torch.randn(3, 3, 8, 8), None, fg.Config(0.5, method="magnitude"))


def test_loaded_weights_and_statistics(small, tmp_path):
    x = torch.randn(5, 3, 8, 8)
    state = {
        k: v + torch.rand_like(v) if v.dim() else v for k, v in small.model.state_dict().items()
    }
    small.model.load_state_dict(state, assign=True)

    fg.export(small, tmp_path / "a.onnx")
    fg.export(small, tmp_path / "a.pt2", "pt2")

    expected = output(small.model, {"input": x})
    found = run_session(onnx_session(tmp_path / "a.onnx"), ((x,), {}))[0]
    assert near(found, expected)
    assert near(torch.export.load(tmp_path / "a.pt2").module()(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_class_in_another_precision(small, dtype, tmp_path):
    small.model.to(dtype)

    fg.export(small, tmp_path / "a.pt2", "pt2")

    x = torch.randn(5, 3, 8, 8, dtype=dtype)
    found = torch.export.load(tmp_path / "a.pt2").module()(x)
    assert found.dtype == dtype
    assert near(found, small.model(x), 2e-2)


def test_what_wraps_the_layers_is_exported_or_refused(tmp_path):
    peft = pytest.importorskip("peft")
    result, inputs = owned("llama"), EVERY["llama"].batch(3, 11)
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    peft.get_peft_model(result.model, config)  # in place

    fg.export(result, tmp_path / "a.onnx")

    assert near(in_onnx_runtime(tmp_path / "a.onnx", inputs), output(result.model, inputs))
    result = owned("llama")
    layer = result.model.model.layers[0]
    layer.mlp = nn.Sequential(layer.mlp)
    with pytest.raises(FaspGraphError, match=r"has no weight .* help: merge what wraps it"):
        fg.export(result, tmp_path / "c.onnx", cache=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_a_recovered_model(tmp_path):
    result, inputs = families.pruned("llama"), EVERY["llama"].batch(3, 11)
    found = fg.recover(result, [EVERY["llama"].batch(4, 11)], lora=0, learning_rate=1e-2)
    assert not near(output(result.model, inputs), output(found.model, inputs), 1e-3)

    trained(found.model, inputs, 3)
    fg.export(found, tmp_path / "a.onnx")

    expected = output(found.model, inputs)
    assert near(in_onnx_runtime(tmp_path / "a.onnx", inputs), expected)
    assert near(output(found.graph_module, inputs), expected)


ELEMENT = {"float32": 1, "float16": 10, "int8": 1}  # TensorProto's, of the logits


@pytest.mark.parametrize(
    ("half", "dtype", "cache"),
    [
        (torch.bfloat16, "float32", False),
        (torch.bfloat16, "float16", True),
        (torch.float16, "int8", False),
    ],
)
def test_a_model_in_half_precision_is_written_as_asked(half, dtype, cache, tmp_path):
    model, inputs, _ = decoding.llama()
    result = fg.prune(model.to(half), inputs, None, fg.Config(0.2, method="magnitude"))

    found = fg.export(result, tmp_path / "a.onnx", dtype=dtype, cache=cache)

    expected = output(copy.deepcopy(result.model).float(), inputs)
    file = onnx.load(found.path)
    assert file.graph.output[0].type.tensor_type.elem_type == ELEMENT[dtype]
    weights = {held.data_type for held in file.graph.initializer if len(held.dims) > 1}
    assert (onnx.TensorProto.INT8 in weights) == (dtype == "int8")
    metadata = {entry.key: entry.value for entry in file.metadata_props}
    name = str(half).removeprefix("torch.")
    assert metadata["fasp_graph.model_dtype"] == found.model_dtype == name
    slack = {"float32": 1e-4, "float16": 1e-2, "int8": 2e-1}[dtype]
    ids = inputs["input_ids"]
    shown = with_cache(found.path, ids) if cache else in_onnx_runtime(found.path, inputs)
    assert near(shown, expected, slack)
    assert next(result.model.parameters()).dtype == half


def test_precision_may_change_on_the_way(small, tmp_path):
    x = torch.randn(5, 3, 8, 8)
    small.model.half()

    found = fg.export(small, tmp_path / "a.onnx")

    expected = copy.deepcopy(small.model).float()(x)
    assert found.model_dtype == "float16"
    assert near(run_session(onnx_session(found.path), ((x,), {}))[0], expected)
    half = torch.randn(3, 3, 8, 8).half()
    again = fg.prune(small.model, half, None, fg.Config(method="magnitude"))
    again.model.float()
    found = fg.export(again, tmp_path / "b.onnx")
    assert found.model_dtype is None
    assert near(run_session(onnx_session(found.path), ((x,), {}))[0], again.model(x))
