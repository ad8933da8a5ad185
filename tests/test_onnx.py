"""ONNX files: metadata, dynamic axes, and nothing half-written."""

import json

import decoding
import families
import numpy as np
import onnx
import pytest
import torch

import fasp_graph as fg
from fasp_graph.emit.dense import dense_twin
from fasp_graph.exports import caching
from fasp_graph.exports import onnx as emitter
from fasp_graph.exports.onnx_reduce import reduce
from passes.errors import ConfigError, VerificationError
from passes.values import CLOSED

pytestmark = pytest.mark.xdist_group("families")


@pytest.fixture(scope="module")
def pruned():
    return fg.prune(*decoding.llama(), fg.Config(sparsity=0.2))


@pytest.fixture(scope="module")
def plain():
    """Two layers, which are written in a tenth of the time."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    return fg.prune(model, torch.randn(3, 6), None, fg.Config(0.2, method="magnitude"))


def test_the_file_holds_the_plan_and_the_opset(pruned, tmp_path, capfd):
    path = fg.export_onnx(pruned, tmp_path / "small.onnx")

    model = onnx.load(path)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    plan = json.loads(metadata["fasp_graph.plan"])
    assert plan == json.loads(json.dumps(pruned.plan.to_dict()))
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [emitter.OPSET]
    assert told(model.graph.input) == {"input_ids": ["batch_size", "sequence_length"]}
    assert told(model.graph.output) == {"logits": ["batch_size", "sequence_length", 101]}
    (entry,) = emitter.onnx_session(path).get_inputs()
    assert entry.shape == ["batch_size", "sequence_length"]
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"]
    assert "torch.onnx" not in "".join(capfd.readouterr())


def told(values):
    """The axes of inputs or outputs, names for those that are dynamic."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in values}
    return {name: [d.dim_param or d.dim_value for d in dims] for name, dims in shapes.items()}


def test_a_mismatch_leaves_the_old_file(plain, tmp_path, monkeypatch):
    path = tmp_path / "small.onnx"
    path.write_text("old")
    run = emitter.run_session
    monkeypatch.setattr(
        emitter, "run_session", lambda session, inputs: [run(session, inputs)[0] + 0.01]
    )

    with pytest.raises(VerificationError, match="differ by"):
        fg.export_onnx(plain, path)

    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"]


def test_other_sizes_are_compared(pruned, tmp_path, monkeypatch):
    shapes = []
    run = emitter.run_session

    def spy(session, inputs):
        shapes.append({tuple(v.shape) for v in torch.utils._pytree.tree_leaves(inputs)})
        return run(session, inputs)

    monkeypatch.setattr(emitter, "run_session", spy)

    fg.export_onnx(pruned, tmp_path / "small.onnx")

    assert len(shapes) == 2 and shapes[0].isdisjoint(shapes[1])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_the_checker_refuses_is_not_written(plain, tmp_path, monkeypatch, dtype):
    """ONNX Runtime takes a graph without a name, the standard does not."""
    step = "_program" if dtype == "float32" else "reduce"
    make = getattr(emitter, step)

    def nameless(*given):
        made = make(*given)
        if made is not None:
            made.model.graph.name = ""
            return made
        model = onnx.load(given[0])
        model.graph.name = ""
        onnx.save(model, given[0])

    monkeypatch.setattr(emitter, step, nameless)

    with pytest.raises(fg.FaspGraphError, match="cannot be written as ONNX.*name.*graph"):
        fg.export(plain, tmp_path / "small.onnx", dtype=dtype)

    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written(plain, tmp_path):
    with pytest.raises(fg.FaspGraphError, match="does not exist"):
        fg.export_onnx(plain, tmp_path / "nowhere" / "small.onnx")
    with pytest.raises(fg.FaspGraphError, match="is a folder"):
        fg.export_onnx(plain, tmp_path)
    with pytest.raises(fg.FaspGraphError, match="small must end in .onnx · help: small.onnx"):
        fg.export_onnx(plain, tmp_path / "small")

    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------- smaller numbers
@pytest.mark.parametrize(
    ("dtype", "slack", "apart"), [("float16", 0.01, True), ("int8", 0.05, False)]
)
def test_smaller_numbers_and_their_perplexity(pruned, tmp_path, dtype, slack, apart):
    torch.manual_seed(0)
    tokens = torch.randint(3, 101, (4, 12))

    found = fg.export(
        *(pruned, tmp_path / "small.onnx"),
        **{"dtype": dtype, "tokens": tokens},
        **({"external_data_bytes": 1000} if apart else {}),
    )

    expected = fg.perplexity(pruned.model, tokens)
    assert found.perplexity == pytest.approx(expected, rel=slack)
    assert found.files == (("small.onnx", "small.onnx.data") if apart else ("small.onnx",))
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(found.files)
    model = onnx.load(tmp_path / "small.onnx")
    held = sum(len(weight.raw_data) for weight in model.graph.initializer)
    assert held < 0.7 * pruned.report.bytes_after
    assert [entry.key for entry in model.metadata_props] == ["fasp_graph.plan"]
    assert not any(node.metadata_props for node in model.graph.node)
    kinds = {node.op_type for node in model.graph.node}
    assert ("MatMulInteger" in kinds) == (dtype == "int8")


def test_float16_keeps_the_order_of_nodes(tmp_path):
    """The cast of a constant, for an op that stays float32, is made before it is read."""
    path, make = tmp_path / "sums.onnx", onnx.helper
    x, y = (make.make_tensor_value_info(name, 1, ["batch", 4]) for name in "xy")
    nodes = [make.make_node("CumSum", ["ones", "axis"], ["sums"])]
    nodes.append(make.make_node("Add", ["x", "sums"], ["y"]))
    held = {"ones": np.ones((1, 4), np.float32), "axis": np.array(1)}
    weights = [onnx.numpy_helper.from_array(value, name) for name, value in held.items()]
    graph = make.make_graph(nodes, "sums", [x], [y], weights)
    version = [make.make_opsetid("", emitter.OPSET)]
    onnx.save(make.make_model(graph, opset_imports=version, ir_version=10), path)

    reduce(path, "float16", False)

    onnx.checker.check_model(str(path))
    zeros = torch.zeros(2, 4)
    (found,) = emitter.run_session(emitter.onnx_session(path), ((zeros,), {}))
    assert found.dtype == torch.float16 and found.tolist() == [[1, 2, 3, 4]] * 2


def test_options_that_mean_nothing(pruned, tmp_path):
    with pytest.raises(ConfigError, match="no dtype 'float8'"):
        fg.export(pruned, tmp_path / "small.onnx", dtype="float8")
    with pytest.raises(ConfigError, match="no format 'tflite'"):
        fg.export(pruned, tmp_path / "small.onnx", "tflite")
    with pytest.raises(ConfigError, match="belong to onnx"):
        fg.export(pruned, tmp_path / "small.pt2", "pt2", cache=True)


# ------------------------------------------------------------------------------------ with a cache
def decoder_of(name):
    config = fg.Config(method="magnitude", sparsity=0.3)
    if name == "gemma3":
        model = families.build(name)
        model.config.sliding_window = 5  # of tokens; the text is longer
        return fg.prune(model, families.tokens(), None, config)
    model, inputs, known = families.program(name)
    return fg.prune(model, inputs, None, config, program=known)


@pytest.fixture(scope="module")
def llama():
    return decoder_of("llama")


def prompt():
    """Two prompts of 6 and 4 tokens, padded on the left."""
    torch.manual_seed(1)
    ids, mask = torch.randint(3, families.VOCABULARY, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    ids[1, :2] = 2
    return ids, mask


def text_of(model, ids, mask):
    options = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    return model.generate(ids, attention_mask=mask, eos_token_id=None, **options)


def test_a_decoder_with_its_cache_in_onnx_runtime(llama, tmp_path, monkeypatch):
    written = []
    program = emitter._program
    monkeypatch.setattr(
        emitter, "_program", lambda *given: written.append(given) or program(*given)
    )

    found = fg.export(llama, tmp_path / "model.onnx", cache=True)

    assert decoding.on_weights_of(llama.model, written[0][0])
    session = emitter.onnx_session(tmp_path / "model.onnx")
    shapes = {entry.name: entry.shape for entry in session.get_inputs()}
    cached = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    past = [f"past_key_values.{name}" for name in cached]
    assert list(shapes) == ["input_ids", "attention_mask", *past, "position_ids"]
    names = [entry.name for entry in session.get_outputs()]
    assert names == ["logits", *[f"present.{name}" for name in cached]]
    grown = ["batch_size", 2, "past_sequence_length"]
    kept = [shapes[name][3] for name in past]
    assert [shapes[name][:3] for name in past] == [grown] * 4
    assert kept[::2] == [8, 8] and max(kept[1::2]) < 8
    assert (found.cache_bytes, found.dense_cache_bytes) == (4 * 2 * sum(kept), 4 * 2 * 32)
    assert found.uncut == ()
    ids, mask = prompt()
    made = decoding.greedy(session, ids.numpy(), mask.numpy(), 7)
    assert made.tolist() == text_of(llama.model, ids, mask).tolist()


def test_a_cache_of_float16_takes_half_the_bytes(pruned, tmp_path):
    found = fg.export(pruned, tmp_path / "model.onnx", cache=True, dtype="float16")

    entries = emitter.onnx_session(tmp_path / "model.onnx").get_inputs()
    past = [entry for entry in entries if entry.name.startswith("past_key_values")]
    assert {entry.type for entry in past} == {"tensor(float16)"}
    numbers = sum(entry.shape[1] * entry.shape[3] for entry in past)
    assert (found.cache_bytes, found.dense_cache_bytes) == (2 * numbers, 2 * 2 * 2 * 8)


def test_prompt_and_later_tokens_are_compared(pruned, tmp_path, monkeypatch):
    run, lengths = emitter.run_session, []

    def wrong_later(session, inputs):
        ids, mask = inputs[0][:2]
        lengths.append((ids.shape[1], mask.shape[1] - ids.shape[1]))
        return [output + (ids.shape[1] == 1) for output in run(session, inputs)]

    monkeypatch.setattr(emitter, "run_session", wrong_later)

    with pytest.raises(VerificationError, match="differ by"):
        fg.export(pruned, tmp_path / "model.onnx", cache=True)

    assert [past for _, past in lengths] == [caching.PAST, 0, 2 * caching.PAST]
    assert list(tmp_path.iterdir()) == []


class Stepper:
    """A captured decoder in the place of an ONNX session."""

    def __init__(self, decoder):
        self.decoder = decoder

    def get_inputs(self):
        leaves = torch.utils._pytree.tree_leaves(self.decoder.inputs)
        return [Entry(*pair) for pair in zip(self.decoder.input_names, leaves, strict=True)]

    def get_outputs(self):
        return [Entry(name, torch.empty(0)) for name in self.decoder.output_names]

    def run(self, _, feed):
        given = [torch.from_numpy(np.ascontiguousarray(feed[n])) for n in self.decoder.input_names]
        count = len(self.decoder.growing)
        past, places = given[2 : 2 + count], given[2 + count :]
        with torch.no_grad():
            logits, present = self.decoder.graph_module(*given[:2], past, *places)
        return [logits.numpy(), *[tensor.numpy() for tensor in present]]


class Entry:
    type = "tensor(float)"

    def __init__(self, name, tensor):
        self.name = name
        free = (0, 2) if name.startswith("past") else ()
        self.shape = ["free" if d in free else n for d, n in enumerate(tensor.shape)]


@pytest.mark.parametrize("name", ["opt", "gpt2", "phi3", "gpt-neox", "gemma3", "mixtral"])
def test_a_captured_decoder_writes_the_same_text(name):
    result = decoder_of(name)

    decoder = caching.cached_decoder(dense_twin(result.model, result.deps, result.plan.kept))

    assert decoder.cache_numbers < decoder.dense_cache_numbers
    ids, mask = prompt()
    made = decoding.greedy(Stepper(decoder), ids.numpy(), mask.numpy(), 7)
    assert made.tolist() == text_of(result.model, ids, mask).tolist()


def test_a_cache_that_cannot_shrink_is_reported(llama, monkeypatch):
    monkeypatch.setattr(caching, "OpenAxes", lambda *axes: CLOSED)
    twin = dense_twin(llama.model, llama.deps, llama.plan.kept)

    decoder = caching.cached_decoder(twin)

    assert decoder.cache_numbers == decoder.dense_cache_numbers
    assert "model.layers.0.self_attn.v_proj.weight" in decoder.uncut
    with pytest.raises(VerificationError, match="with its cache"):
        caching.verify(decoder, families.build("llama"))


def test_what_has_no_cache_is_refused(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.ReLU(), torch.nn.Linear(9, 4))
    result = fg.prune(model, torch.randn(3, 6), None, fg.Config(method="magnitude", sparsity=0.3))

    with pytest.raises(fg.FaspGraphError, match="without a cache"):
        fg.export(result, tmp_path / "model.onnx", cache=True)


def test_inputs_outputs_and_their_axes_have_names(plain, tmp_path):
    graph = onnx.load(plain.export_onnx(tmp_path / "named.onnx")).graph

    assert told(graph.input) == {"input": ["batch_size", 6]}
    assert told(graph.output) == {"output": ["batch_size", 4]}


class Several(torch.nn.Module):
    """Axes that nothing ties to each other, one of them behind the second."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(9, 6)
        self.up, self.down = torch.nn.Linear(6, 16), torch.nn.Linear(16, 3)

    def forward(self, ids, other, pages):
        return tuple(self.down(self.up(self.table(x)).relu()) for x in (ids, other, pages))


def test_axes_that_are_not_the_usual_ones_have_names(tmp_path):
    inputs = {"ids": (3, 5), "other": (4, 7), "pages": (2, 6, 8)}
    example = {name: torch.randint(0, 9, shape) for name, shape in inputs.items()}
    pruned = fg.prune(Several(), example, None, fg.Config(0.3, method="magnitude"))

    session = emitter.onnx_session(fg.export_onnx(pruned, tmp_path / "small.onnx"))

    assert [entry.shape for entry in session.get_inputs()] == [
        ["batch_size", "sequence_length"],
        ["other_batch_size", "other_sequence_length"],
        ["pages_batch_size", "axis_1", "axis_2"],
    ]


def test_weights_that_lay_beside_an_earlier_file_go(plain, tmp_path):
    path = tmp_path / "small.onnx"
    apart = fg.export(plain, path, external_data_bytes=1000)
    assert apart.files == (path.name, f"{path.name}.data")

    found = fg.export(plain, path)

    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert (found.files, found.bytes) == ((path.name,), path.stat().st_size)


class Named(torch.nn.Module):
    """Calls its outputs as an op, a weight and a buffer are called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(6, 16), torch.nn.Linear(16, 3)
        self.weight, self.shift = torch.nn.Parameter(torch.randn(3)), torch.nn.Buffer(torch.ones(3))

    def forward(self, x):
        y = self.down(torch.relu(self.up(x))) * self.weight + self.shift
        return {"linear": y.softmax(-1), "softmax": y, "weight": y * 2, "shift": y.mean()}


def test_outputs_may_be_called_as_other_values_are(tmp_path):
    pruned = fg.prune(Named(), torch.randn(5, 6), None, fg.Config(0.3, method="magnitude"))

    session = emitter.onnx_session(fg.export_onnx(pruned, tmp_path / "small.onnx"))
    names = " ".join(entry.name for entry in session.get_outputs())
    assert names == "linear softmax weight shift"
