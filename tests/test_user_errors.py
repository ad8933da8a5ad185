"""Errors that a call can end in, one line each: what is done, and what the user then reads."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.fx import Graph, GraphModule

import fasp_graph as fg
from fasp_graph import corpora, data, jsontext
from fasp_graph.evaluate import call_with_tokens, logits_of
from fasp_graph.exports import caching, onnx
from fasp_graph.folders.huggingface import save
from fasp_graph.folders.lazyfolder import open_folder
from fasp_graph.folders.manifest import FORMAT, read_manifest
from fasp_graph.folders.origin import Loaded, remember
from fasp_graph.folders.shards import folder_tensors, stored
from fasp_graph.measures import _accuracy, accuracy, embeddings
from fasp_graph.quality import Quality
from fasp_graph.scale import journal
from fasp_graph.scale.spill import Spill
from fasp_graph.targets import example_inputs
from passes.capture import capture

IDS = torch.zeros(2, 3, dtype=torch.long)
BARE = data.Target("bare", nn.Flatten(), torch.zeros(2, 4))  # no tokenizer


def quality(source=None, reference=None, target=BARE):
    return Quality(target, source, reference, 4, 2, None).measure()


class Two(nn.Module):
    """Tokens under a name of its own, beside the embedding's scale."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, words, scale):
        return self.table(words) * scale


def positional():
    graph = capture(Two(), (IDS, torch.ones(1))).graph_module
    return call_with_tokens(graph, IDS)


def named():
    graph = capture(Two(), {"words": IDS, "scale": torch.ones(1)}).graph_module
    assert isinstance(graph, GraphModule)
    return call_with_tokens(graph, IDS)


def without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    corpora.image_batches([tmp_path / "a.png"], (3, 4, 4), 0.5, 0.5)


def large(tmp_path, monkeypatch):
    monkeypatch.setattr(jsontext, "LARGEST", 3)
    jsontext.read_object(text(tmp_path, '{"a": 1}'))


def text(tmp_path, content):
    (tmp_path / "file.txt").write_text(content)
    return tmp_path / "file.txt"


def shard(tmp_path, content=None):
    path = tmp_path / "model.safetensors"
    if content is None:
        save_file({"weight": torch.ones(2, 2)}, path)
    else:
        path.write_bytes(content)
    return path


def shortened(tmp_path, _):
    """The file shrinks after its header was read."""
    path = shard(tmp_path)
    (held,) = stored(path).values()
    path.write_bytes(path.read_bytes()[:-4])
    held.read()


def ours(tmp_path, **changes):
    """A folder that says it is ours."""
    held = {"format": FORMAT, "weights": {}, "aliases": {}, "files": []}
    emission = {"shapes": {}, "attributes": {}, "padded": {}, "gather": {}, "scatter": {}}
    held |= {"emission": emission, "class": "LlamaForCausalLM", **changes}
    (tmp_path / "fasp_graph.json").write_text(json.dumps(held))
    return tmp_path


def misconfigured(tmp_path, _):
    (tmp_path / "config.json").write_text('{"hidden_size": "wide"}')
    fg.load(ours(tmp_path))


def only_a_graph(tmp_path, _):
    origin = SimpleNamespace(emission=SimpleNamespace(ways={"a": "graph"}))
    save(remember(nn.Linear(2, 2), origin), tmp_path / "small")


def loaded_from(folder):
    return remember(nn.Linear(2, 2), Loaded(folder, read_manifest(folder)))


def not_finite(_, __):
    model = nn.Embedding(9, 9)
    with torch.no_grad():
        model.weight.fill_(float("nan"))
    fg.recover(model, [IDS], lora=0)


def cut_short(tmp_path, _):
    path = shard(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    stored(path)


def no_program(_, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    inputs = ((torch.zeros(2, 4),), {})
    onnx._program(capture(nn.Linear(4, 3), inputs[0]).graph_module, inputs, None, onnx.Form())


def unseen(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "world", lambda: (1, 2))  # not the rank that makes the folder
    monkeypatch.setattr(journal, "total", lambda tensor: tensor)
    journal.open_journal(tmp_path / "elsewhere", "key", GraphModule(nn.Module(), Graph()))


def index_of_none(tmp_path, _):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    folder_tensors(tmp_path)


ERRORS = {
    "data: a file that is missing": (
        lambda t, m: data.calibration_batches(BARE, "none.txt", 4, 2),
        "cannot read none.txt: no such file or folder",
    ),
    "data: a folder that is missing": (
        lambda t, m: data.heldout_tokens(BARE, "./none", 4, 2),
        "cannot read ./none: no such file or folder",
    ),
    "data: text, and no tokenizer": (
        lambda t, m: data.calibration_batches(BARE, str(text(t, "words")), 4, 2),
        "bare has no tokenizer, so text cannot calibrate it · help: pass package.module:factory",
    ),
    "data: a name, and no tokenizer": (
        lambda t, m: data.calibration_batches(BARE, "none", 4, 2),
        "cannot calibrate it; nor is none a file or folder here · help: ",
    ),
    "data: text to evaluate, and no tokenizer": (
        lambda t, m: data.heldout_tokens(BARE, str(text(t, "words")), 4, 2),
        "no perplexity on text · help: pass package.module:factory, a function that returns tokens",
    ),
    "data: an empty file": (
        lambda t, m: corpora.text_of(str(text(t, " \n"))),
        "file.txt holds no text: it is empty · help: ",
    ),
    "data: a folder without text": (
        lambda t, m: corpora.text_of(str(t)),
        "no file with text in it ends in .json, .jsonl, .md, .parquet, .py, .rst, .txt",
    ),
    "data: images without Pillow": (without_pillow, "images need Pillow · help: pip install"),
    "eval: text, and no tokenizer": (
        lambda t, m: quality(str(text(t, "words"))),
        "bare has no tokenizer, so it cannot read text",
    ),
    "eval: a file that is missing": (lambda t, m: quality("none.txt"), "cannot read none.txt: no"),
    "eval: a reference without data": (
        lambda t, m: quality(reference="zoo:resnet"),
        "--reference needs --data, the text to embed",
    ),
    "eval: a reference without a tokenizer": (
        lambda t, m: quality(str(text(t, "words")), "zoo:resnet"),
        "bare has no tokenizer, so it cannot read text",
    ),
    "eval: images without classes": (
        lambda t, m: (t / "a.png").write_bytes(b"") or quality(str(t)),
        "holds no folder for each class · help: CLASS/IMAGE",
    ),
    "eval: no embedding": (
        lambda t, m: embeddings(nn.Identity(), [torch.zeros(2, 3, 4, 5)]),
        "an embedding is made of [batch, width] or [batch, length, width], not (2, 3, 4, 5)",
    ),
    "eval: no samples": (
        lambda t, m: accuracy(nn.Identity(), []),
        "no samples to measure accuracy on · help: give at least one batch",
    ),
    "eval: a task without accuracy": (
        lambda t, m: _accuracy("wikitext", {"word_perplexity,none": 9.0}),
        "the task wikitext has no accuracy, but word_perplexity,none · help: a task of choices has",
    ),
    "eval: a function of data that fails": (
        lambda t, m: corpora.made("math:sqrt"),
        "math:sqrt() failed: TypeError: ",
    ),
    "model: a function that fails": (
        lambda t, m: data.load_target("math:sqrt"),
        "math:sqrt() failed: TypeError: ",
    ),
    "model: no example": (
        lambda t, m: example_inputs(SimpleNamespace(main_input_name="input_features")),
        "takes input_features, for which no example can be made · help: use package.module:factory",
    ),
    "graph: no such group": (
        lambda t, m: fg.analyze(nn.Linear(4, 3), torch.zeros(2, 4))["fc.0"],
        "no group named 'fc.0' · help: deps.groups lists 2 groups",
    ),
    "export: another cache": (
        lambda t, m: caching.flat(SimpleNamespace(layers=[SimpleNamespace(states=IDS)])),
        "this model's cache is not a key and a value per layer · help: export it without a cache",
    ),
    "export: no program": (
        no_program,
        "torch.onnx.export returned no program · help: format='pt2' may work",
    ),
    "export: int8 that overflows": (
        lambda t, m: onnx._same(torch.ones(2), torch.tensor([1.0, float("inf")]), 0, "int8"),
        "output 0 is not finite in int8 · help: another dtype",
    ),
    "eval: no texts": (lambda t, m: embeddings(nn.Identity(), []), "no texts to embed · help: "),
    "eval: no logits": (
        lambda t, m: logits_of(torch.zeros(2, 3)),
        "perplexity needs logits [batch, length, vocabulary]; the model returned Tensor",
    ),
    "eval: a graph of two inputs": (lambda t, m: positional(), "cannot fill the inputs of this"),
    "eval: a graph of named inputs": (
        lambda t, m: named(),
        "perplexity cannot fill the input 'words' of this graph · help: capture it with input_ids",
    ),
    "folder: too large a file of JSON": (large, "has 8 bytes; at most 3 are read"),
    "folder: a list": (
        lambda t, m: jsontext.read_object(text(t, "[1]")),
        "file.txt holds a JSON list, not an object",
    ),
    "folder: no configuration": (
        lambda t, m: fg.load(ours(t)),
        "holds no config.json for LlamaForCausalLM",
    ),
    "folder: a configuration of nothing": (misconfigured, "makes no LlamaForCausalLM: "),
    "folder: a broken file": (
        lambda t, m: fg.load(
            ours(t, weights={"a.safetensors": _hash(t, b"broken")}), nn.Linear(2, 2)
        ),
        "holds a broken safetensors file: ",
    ),
    "folder: other ties": (
        lambda t, m: save(loaded_from(ours(t, aliases={"b": "a"})), t / "new"),
        "the model ties other weights than ",
    ),
    "folder: only a graph": (only_a_graph, "which a folder cannot hold · help: use export_onnx"),
    "stream: no weights": (
        lambda t, m: folder_tensors(t),
        "model.safetensors is not there · help: streaming reads safetensors only",
    ),
    "stream: a shard is missing": (index_of_none, "1.safetensors is not there · help: "),
    "stream: no configuration": (
        lambda t, m: shard(t) and open_folder(t),
        "cannot be opened: ",
    ),
    "stream: no header": (
        lambda t, m: stored(shard(t, b"\x04\0\0\0\0\0\0\0oops")),
        "is no readable safetensors file: ",
    ),
    "stream: a header of nothing": (
        lambda t, m: stored(shard(t, b"\x02\0\0\0\0\0\0\0[]")),
        "is no safetensors file",
    ),
    "stream: a file that is cut short": (
        cut_short,
        "model.safetensors is cut short or damaged at weight · help: fetch it again",
    ),
    "stream: a folder that one rank does not see": (
        unseen,
        "rank 1 does not see ",
    ),
    "stream: a file that shrinks": (shortened, "ends early · help: fetch it again"),
    "recover: no data": (
        lambda t, m: fg.recover(nn.Linear(4, 3), []),
        "no data to recover on · help: give at least one batch of inputs",
    ),
    "recover: nothing for LoRA": (
        lambda t, m: fg.recover(nn.Embedding(9, 9), [IDS]),
        "Embedding has no linear layer for LoRA · help: lora=0 trains all weights",
    ),
    "recover: a loss that is no number": (
        not_finite,
        "the loss is nan at step 1 · help: a lower learning_rate",
    ),
    "max_memory: no room": (
        lambda t, m: Spill(1, folder=str(t / "none"))._file(8),
        "help: set TMPDIR to a folder with room, or a larger max_memory",
    ),
}


def _hash(tmp_path, content):
    import hashlib

    (tmp_path / "a.safetensors").write_bytes(content)
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("case", ERRORS)
def test_what_the_user_reads(case, tmp_path, monkeypatch):
    call, message = ERRORS[case]

    with pytest.raises(fg.FaspGraphError) as caught:
        call(tmp_path, monkeypatch)

    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": "much"}, "sparsity='much' has the wrong type: str, where a finite number is"),
        ({"align": 2.5}, "align=2.5 has the wrong type: float, where a whole number is expected"),
        ({"align": True}, "align=True has the wrong type: bool, where a whole number"),
        ({"method": 3}, "method=3 has the wrong type: int, where a text is expected"),
        ({"score": 3}, "score=3 has the wrong type: int, where a text or None is expected"),
        ({"check": "yes"}, "check='yes' has the wrong type: str, where True or False is"),
        ({"kinds": "chain"}, "kinds='chain' has the wrong type: str, where a tuple of which each"),
        ({"min_keep": None}, "on the command line --min-keep"),
    ],
)
def test_a_field_of_the_wrong_type(options, words):
    with pytest.raises(fg.FaspGraphError) as caught:
        fg.Config(**options)

    assert words in str(caught.value)
