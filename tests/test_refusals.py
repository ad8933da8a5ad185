"""What no graph can hold is refused in words: names that torch.fx needs for itself, packed
sequences, ops without an ONNX function.
"""

import re
from pathlib import Path

import decoding
import families
import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn.utils import rnn

import fasp_graph as fg
from passes.errors import CalibrationError, CaptureError, FaspGraphError, brief, causes
from passes.refuse import source_line

CONFIG = fg.Config(sparsity=0.3, method="magnitude")
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Named(nn.Module):
    """A layer under a name of the test's choice, as a module or as a bare weight."""

    def __init__(self, name, kind):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.down, weight = name, nn.Linear(16, 3), torch.randn(16, 6)
        if kind == "module":
            self.add_module(name, nn.Linear(6, 16))
        elif kind == "parameter":
            self.register_parameter(name, nn.Parameter(weight))
        elif kind == "buffer":
            self.register_buffer(name, weight)
        else:
            setattr(self, name, weight)

    def forward(self, x):
        held = getattr(self, self.name)
        return self.down(torch.relu(held(x) if isinstance(held, nn.Module) else x @ held.T))


class Holder(nn.Module):
    """What the message recommends, of several models."""

    def __init__(self, models):
        super().__init__()
        self.model = nn.ModuleList(models)

    def forward(self, x):
        return [model(x) for model in self.model]


@pytest.mark.parametrize("kind", ["module", "parameter", "buffer", "tensor"])
def test_names_that_a_graph_module_needs_are_refused_with_a_way_that_works(kind):
    names = ["code", "graph", "meta", "recompile"]
    models = [Named(name, kind).eval() for name in names]
    for name, model in zip(names, models, strict=True):
        with pytest.raises(CaptureError, match=rf"Named\.{name} has a name .*help.*model\.{name}"):
            fg.prune(model, X, None, CONFIG)

    pruned = fg.prune(Holder(models), X, None, CONFIG)

    torch.testing.assert_close(pruned.model(X), list(pruned.graph_module(X)))
    for number, name in enumerate(names):
        held = f"model.{number}.{name}"
        assert any(held in weight for weight in pruned.emission.shapes) or kind == "tensor"


class Heads(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.up = nn.Linear(6, 16)
        self.heads = nn.ModuleDict({name: nn.Linear(16, 3) for name in names})

    def forward(self, x):
        return [head(torch.relu(self.up(x))) for head in self.heads.values()]


def test_a_word_of_python_is_no_name():
    with pytest.raises(CaptureError, match=r"name heads\.class holds a word of Python.*help: rena"):
        fg.analyze(Heads("box", "class"), X)
    assert fg.analyze(Heads("graph", "code", "a-b", "classes"), X).groups


class Recurrent(nn.Module):
    """Takes padded sequences and their lengths, and packs them."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x, lengths):
        packed = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.out(self.cell(packed)[1][-1])


PADDED, LENGTHS = torch.zeros(4, 7, 6), torch.tensor([7, 5, 3, 2])
PACKED = rnn.pack_padded_sequence(PADDED, LENGTHS, batch_first=True)


@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS.tolist()], ids=["tensor", "list"])
def test_a_model_that_packs_is_told_to_take_the_padded_batch(lengths):
    words = r"Recurrent cannot be captured: .* packed sequence .*test_refusals\.py:\d+ in forward"
    with pytest.raises(CaptureError, match=words + ".*help.*padded batch"):
        fg.analyze(Recurrent(), (PADDED, lengths))


@pytest.mark.parametrize("inputs", [PACKED, (PACKED,), {"x": {"y": [PACKED]}}])
def test_a_packed_sequence_is_no_input(inputs):
    with pytest.raises(CaptureError, match=r"PackedSequence cannot be an input.*help.*padded"):
        fg.analyze(nn.Linear(6, 3), inputs)


def test_a_packed_sequence_is_no_batch(mlp):
    x = torch.randn(3, 7)
    with pytest.raises(CaptureError, match="PackedSequence cannot be an input"):
        fg.prune(mlp, x, [PACKED], fg.Config())


def test_weight_norm_by_hooks_is_refused_with_ways_that_work():
    old, new = nn.utils.weight_norm, nn.utils.parametrizations.weight_norm
    model = nn.Sequential(old(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 3)).eval()
    words = "module 0 keeps weight, .* help: .*remove_weight_norm.*parametrizations.weight_norm"
    with pytest.raises(CaptureError, match=words):
        fg.analyze(model, X)

    nn.utils.remove_weight_norm(model[0])
    again = nn.Sequential(new(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 3)).eval()

    for allowed in (model, again):
        pruned = fg.prune(allowed, X, None, CONFIG)
        assert any(group.kept < group.units for group in pruned.report.groups)


def test_a_kept_result_of_autograd_is_named():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    model[2].scaled = model[2].weight * 2

    with pytest.raises(CaptureError, match="module 2 keeps scaled, .* help: .* in forward"):
        fg.analyze(model, X)


class Mixed(nn.Module):
    """Half of it under autocast."""

    def __init__(self, enabled=True):
        super().__init__()
        self.up, self.down, self.enabled = nn.Linear(6, 16), nn.Linear(16, 3), enabled

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            return self.down(torch.relu(self.up(x))).float()


@pytest.mark.parametrize("half", [False, True])
def test_autocast_in_forward_is_told_with_its_line_and_ways_out(half):
    model = Mixed().eval()
    model.up = model.up.bfloat16() if half else model.up
    words = r"under torch\.autocast.*test_refusals\.py:\d+ in forward.*help: take torch\.autoc"
    with pytest.raises(CaptureError, match=words) as caught:
        fg.analyze(model, X.bfloat16() if half else X)
    assert "draws at random" not in str(caught.value)

    assert fg.prune(Mixed(enabled=False).eval(), X, None, CONFIG).report.verify_max_error < 1e-9


@torch.library.custom_op("refusals::sinc", mutates_args=())
def sinc(x: torch.Tensor) -> torch.Tensor:
    return torch.sinc(x)


sinc.register_fake(torch.empty_like)


def wave(x):
    return sinc(x)


def spectrum(x):
    return torch.linalg.eigh(x[..., None] * x[..., None, :])[0]


class Through(nn.Module):
    """A function that ONNX has no words for."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def told_by_export(pruned, path, **options):
    words = "cannot be written as ONNX: No ONNX function found"
    with pytest.raises(FaspGraphError, match=words) as caught:
        fg.export(pruned, path, **options)
    assert not list(path.parent.iterdir())
    return str(caught.value)


@pytest.mark.parametrize(
    ("function", "node"),
    [
        (torch.special.bessel_j0, r"special_bessel_j0 -> \(\w+, 3\)"),
        (wave, r"sinc -> \(\w+, 3\)"),
        (spectrum, "linalg_eigh"),
    ],
)
def test_what_onnx_lacks_is_told_in_whole_lines_without_colours(tmp_path, function, node):
    layers = nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3), Through(function)
    pruned = fg.prune(nn.Sequential(*layers).eval(), X, None, CONFIG)

    told = told_by_export(pruned, tmp_path / "lacks.onnx")

    assert "\x1b" not in told and "\n" not in told and len(told) < 600
    place = rf" · node %{node} · module 3 · test_refusals\.py:\d+ in forward · help: another"
    assert re.search(place, told) and told.endswith(" format may do")


def test_what_onnx_runtime_lacks_is_told_with_its_line(tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), Through(nn.GELU()), nn.Linear(16, 3)).double().eval()
    pruned = fg.prune(model, X.double(), None, CONFIG)

    words = (
        r"not run the graph: .*Erf.* · node %gelu .* · module 1\.function · test_refusals\.py:\d+"
    )
    with pytest.raises(FaspGraphError, match=words):
        pruned.export_onnx(tmp_path / "double.onnx")

    assert not list(tmp_path.iterdir())


class WavyLlama(tf.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.norm = Through(wave)


class WavyT5(tf.T5ForConditionalGeneration):
    def __init__(self, config):
        super().__init__(config)
        self.decoder.final_layer_norm = Through(wave)


@pytest.mark.parametrize("parts", [False, True])
def test_with_a_cache_the_users_module_and_line_are_told_too(tmp_path, parts):
    torch.manual_seed(0)
    if parts:
        sizes = {"vocab_size": 101, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 1}
        model, inputs = WavyT5(tf.T5Config(num_heads=3, **sizes)), families.pairs()
    else:
        plain, inputs, _ = decoding.llama()
        model = WavyLlama(plain.config)
    pruned = fg.prune(model.eval(), inputs, None, CONFIG)

    told = told_by_export(pruned, tmp_path / ("parts" if parts else "a.onnx"), cache=True)

    module = "decoder.final_layer_norm" if parts else "model.norm"
    assert f" · module {module} · test_refusals.py:" in told and " in forward · help: " in told


def test_the_first_cause_comes_first_and_no_line_is_cut():
    first = ValueError("\x1b[96mno function\x1b[0m for it\nsee the log")
    error = RuntimeError("step 3\nfailed at length")
    error.__cause__ = first

    assert causes(error, 100) == "no function for it · see the log · step 3 · failed at length"
    assert causes(error, 45) == "no function for it · see the log · step 3"
    assert causes(error, 12) == "no ..."
    assert causes(KeyError(), 12) == "KeyError"
    assert brief("\x1b[1mone  two\nthree\x1b[0m", 11) == "one two ..."


def test_a_batch_that_does_not_run_is_told_up_to_a_word(mlp):
    with pytest.raises(CalibrationError, match=r"does not run: [^·]*[^ ·] · node"):
        fg.prune(mlp, torch.randn(3, 7), [torch.randn(3, 9)], fg.Config())


@pytest.mark.parametrize(("folder", "told"), [("torchvision", "ops.py:1 in make"), ("torch", "")])
def test_the_line_of_an_error_is_the_last_outside_torch_itself(folder, told):
    path, names = Path(torch.__file__).parents[1] / folder / "ops.py", {}
    exec(compile("def make(): return 1 / 0", str(path), "exec"), names)
    with pytest.raises(ZeroDivisionError) as caught:
        names["make"]()

    assert (source_line(caught.value) == told) is bool(told)
