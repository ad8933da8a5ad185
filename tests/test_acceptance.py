"""What a user does with a result, for tiny models of many families: the same numbers each time."""

import copy
import functools
import subprocess
import sys

import families
import pytest
import torch

import fasp_graph as fg
from fasp_graph.onnx import onnx_session, run_session
from passes.capture import as_args, tensors

NAMES = list(families.FAMILIES)
GENERATING = [name for name, family in families.FAMILIES.items() if family.kind != "encoder"]
DECODERS = [name for name, family in families.FAMILIES.items() if family.kind == "decoder"]
PLAIN = ["opt", "llama", "qwen3", "gemma3", "gpt2", "gpt-neox", "mistral", "bert", "vit", "t5"]


@functools.cache
def pruned(name, **options):
    family = families.FAMILIES[name]
    model = families.build(name)
    batches = [family.batch(4, 11) for _ in range(2)]
    return fg.prune(model, family.batch(3, 11), batches, fg.Config(sparsity=0.3, **options))


def output(model, inputs):
    args = as_args(inputs)
    with torch.no_grad():
        return tensors(model(*args[0], **args[1]))[0]


def prompt(name, n=2):
    inputs = families.FAMILIES[name].batch(n, 6)
    return {k: v for k, v in inputs.items() if k not in ("decoder_input_ids", "use_cache")}


@pytest.mark.parametrize("name", NAMES)
def test_the_users_class_has_the_graphs_numbers(name):
    result = pruned(name)
    torch.manual_seed(1)
    inputs = families.FAMILIES[name].batch(2, 11)

    expected = output(result.graph_module, inputs)

    assert type(result.model) is type(families.build(name))
    assert "graph" not in result.emission.ways.values()
    assert torch.allclose(output(result.model, inputs), expected, atol=1e-5)
    again = copy.deepcopy(result.model)
    again.load_state_dict({k: v.clone() for k, v in result.model.state_dict().items()})
    assert torch.equal(output(again, inputs), output(result.model, inputs))
    assert torch.allclose(output(again.double().float(), inputs), expected, atol=1e-5)


@pytest.mark.parametrize("name", GENERATING)
def test_it_generates(name):
    model, inputs = pruned(name).model, prompt(name)
    options = {"max_new_tokens": 6, "min_new_tokens": 6}

    def ids(**more):
        torch.manual_seed(0)
        return model.generate(**inputs, **options, **more)

    greedy = ids(do_sample=False, use_cache=True)
    assert torch.equal(greedy, ids(do_sample=False, use_cache=False))
    assert torch.equal(
        ids(num_beams=2, do_sample=False), ids(num_beams=2, do_sample=False, use_cache=False)
    )
    assert torch.equal(
        ids(do_sample=True, top_k=20), ids(do_sample=True, top_k=20, use_cache=False)
    )


@pytest.mark.parametrize("name", [n for n in DECODERS if n != "mamba"])
def test_left_padding_changes_no_text(name):
    model, ids = pruned(name).model, prompt(name, 1)["input_ids"]
    padded = torch.cat([torch.full((1, 3), 2), ids], 1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones_like(ids)], 1).long()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

    alone = model.generate(ids, **options)[0, ids.shape[1] :]
    with_padding = model.generate(padded, attention_mask=mask, **options)

    assert with_padding[0, padded.shape[1] :].tolist() == alone.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_it_fine_tunes(name):
    model = copy.deepcopy(pruned(name).model).train()
    torch.manual_seed(0)
    inputs = families.FAMILIES[name].batch(3, 11)
    target = 2 * output(families.build(name), inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(20):
        loss = (tensors(model(**inputs))[0] - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    assert losses[-1] < losses[0]


LOAD = """
import sys, torch, fasp_graph as fg, transformers
for line in sys.stdin.read().split():
    auto, folder = line.split("=")
    model, inputs = fg.load(folder), torch.load(folder + ".inputs")
    again = getattr(transformers, auto).from_pretrained(folder).eval()
    assert type(again) is type(model), type(again)
    assert torch.allclose(again(**inputs)[0], model(**inputs)[0], atol=1e-6)
    torch.save(model(**inputs)[0], folder + ".out")
"""
AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
}


def auto(name):
    return AUTO.get(name, "AutoModelForCausalLM")


def test_folders_load_in_a_fresh_process(tmp_path):
    names = list(families.FAMILIES)
    expected = {}
    for name in names:
        folder = pruned(name).save(tmp_path / name)
        inputs = families.FAMILIES[name].batch(2, 9)
        torch.save(inputs, f"{folder}.inputs")
        expected[name] = output(pruned(name).model, inputs)

    lines = "\n".join(f"{auto(name)}={tmp_path / name}" for name in names)
    done = subprocess.run(
        [sys.executable, "-c", LOAD], input=lines, text=True, capture_output=True, check=False
    )

    assert done.returncode == 0, done.stderr[-2000:]
    for name in names:
        assert torch.allclose(torch.load(f"{tmp_path / name}.out"), expected[name], atol=1e-5), name


PLAIN_LOAD = """
import sys, torch, transformers
sys.modules["fasp_graph"] = None
for line in sys.stdin.read().split():
    auto, folder = line.split("=")
    model = getattr(transformers, auto).from_pretrained(folder)
    inputs = torch.load(folder + ".inputs")
    torch.save(model.eval()(**inputs)[0], folder + ".out")
"""


def test_the_uniform_layout_loads_without_this_package(tmp_path):
    lines, expected = [], {}
    for name in PLAIN:
        result = pruned(name, layout="uniform")
        folder = result.save(tmp_path / name, max_shard_size=40_000)
        inputs = families.FAMILIES[name].batch(2, 9)
        torch.save(inputs, f"{folder}.inputs")
        expected[name] = output(result.model, inputs)
        assert (folder / "model.safetensors.index.json").is_file()
        lines.append(f"{auto(name)}={folder}")

    done = subprocess.run(
        [sys.executable, "-c", PLAIN_LOAD],
        input="\n".join(lines),
        text=True,
        capture_output=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-2000:]
    for name in PLAIN:
        assert torch.allclose(torch.load(f"{tmp_path / name}.out"), expected[name], atol=1e-5), name
        assert torch.allclose(
            output(fg.load(tmp_path / name), torch.load(f"{tmp_path / name}.inputs")),
            expected[name],
            atol=1e-5,
        )


@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_agrees(name, tmp_path):
    result = pruned(name)
    inputs = families.FAMILIES[name].batch(3, 11)

    path = result.export_onnx(tmp_path / "small.onnx")

    found = run_session(onnx_session(path), as_args(inputs))[0]
    assert torch.allclose(found, output(result.graph_module, inputs), atol=1e-4)
