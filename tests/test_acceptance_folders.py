"""What a user does with a result on disk: folders in fresh processes, with and without us; ONNX."""

import json
import os
import subprocess
import sys

import families
import pytest
import torch
from families import EVERY, output, prompt, pruned

import fasp_graph as fg
from fasp_graph.exports.onnx import onnx_session, run_session
from passes.capture import as_args

pytestmark = pytest.mark.xdist_group("families")
AUTO = {
    "bert": "AutoModelForSequenceClassification",
    "vit": "AutoModelForImageClassification",
    "t5": "AutoModelForSeq2SeqLM",
    "whisper": "AutoModelForSpeechSeq2Seq",
}
GROUPED = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
SAID = {  # what the configuration says of each family, once it has been pruned
    "llama": GROUPED,
    "qwen3": GROUPED,
    "mistral": GROUPED,
    "gemma3": GROUPED,
    "t5": ("d_ff", "num_heads"),
    "opt": ("ffn_dim",),
    "gpt2": ("n_inner",),
    "gpt-neox": ("intermediate_size",),
    "bert": ("intermediate_size",),
    "vit": ("intermediate_size",),
}
TEXT = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
LOAD = """
import sys, torch, fasp_graph as fg, transformers
for line in sys.stdin.read().split():
    auto, folder = line.split("=")
    model, inputs = fg.load(folder), torch.load(folder + ".inputs")
    again = getattr(transformers, auto).from_pretrained(folder).eval()
    assert type(again) is type(model), type(again)
    assert torch.allclose(again(**inputs)[0], model(**inputs)[0], atol=1e-6)
    text = model.generate(**torch.load(folder + ".prompt"), **%r) if model.can_generate() else None
    torch.save((model(**inputs)[0], text), folder + ".out")
"""
PLAIN_LOAD = """
import sys, torch, transformers
sys.modules["fasp_graph"] = sys.modules["passes"] = None
for line in sys.stdin.read().split():
    auto, folder = line.split("=")
    model = getattr(transformers, auto).from_pretrained(folder)
    inputs = torch.load(folder + ".inputs")
    torch.save(model.eval()(**inputs)[0], folder + ".out")
"""


def in_fresh_process(code, folders, *options, cwd=None):
    lines = "\n".join(f"{AUTO.get(f.name, 'AutoModelForCausalLM')}={f}" for f in folders)
    run = [sys.executable, *options, "-c", code]
    done = subprocess.run(run, input=lines, text=True, capture_output=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]


def test_folders_load_in_a_fresh_process(tmp_path):
    expected = {}
    for name in EVERY:
        model = pruned(name).model
        folder = pruned(name).save(tmp_path / name)
        start = prompt(name) if model.can_generate() else {}
        inputs = EVERY[name].batch(2, 9)
        torch.save(inputs, f"{folder}.inputs")
        torch.save(start, f"{folder}.prompt")
        expected[name] = output(model, inputs), start and model.generate(**start, **TEXT)
        held = {path.suffix for path in folder.iterdir()}
        assert {".json", ".md", ".safetensors"} <= held
        assert held <= {".json", ".md", ".safetensors", ".model"}  # SentencePiece's own file

    in_fresh_process(LOAD % TEXT, [tmp_path / name for name in EVERY])

    for name, (numbers, text) in expected.items():
        found, words = torch.load(f"{tmp_path / name}.out")
        assert torch.allclose(found, numbers, atol=1e-5), name
        assert words is None or torch.equal(words, text), name


def test_the_uniform_layout_loads_without_this_package(tmp_path):
    expected = {}
    for name, fields in SAID.items():
        result = pruned(name, 0.35, method="fasp", layout="uniform", kinds=("chain", "head"))
        folder = result.save(tmp_path / name, max_shard_size=40_000)
        inputs = EVERY[name].batch(2, 9)
        torch.save(inputs, f"{folder}.inputs")
        expected[name] = output(result.graph_module, inputs)
        assert (folder / "model.safetensors.index.json").is_file()
        dense = families.program(name)[0].config.to_dict()
        small = json.loads((folder / "config.json").read_text())
        assert all(small[field] < (dense[field] or 192) for field in fields), name

    in_fresh_process(PLAIN_LOAD, [tmp_path / n for n in SAID], "-I", cwd=os.sep)

    for name, numbers in expected.items():
        assert torch.allclose(torch.load(f"{tmp_path / name}.out"), numbers, atol=1e-5), name
        inputs = torch.load(f"{tmp_path / name}.inputs")
        assert torch.allclose(output(fg.load(tmp_path / name), inputs), numbers, atol=1e-5), name


@pytest.mark.parametrize("name", EVERY)
def test_onnx_runtime_agrees(name, tmp_path):
    result = pruned(name)
    inputs = EVERY[name].batch(3, 11)

    path = result.export_onnx(tmp_path / "small.onnx")

    found = run_session(onnx_session(path), as_args(inputs))[0]
    assert torch.allclose(found, output(result.graph_module, inputs), atol=1e-4)
