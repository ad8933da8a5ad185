"""The coverage benchmark: shrinking by meaning, inputs by name, layers by what the graph does."""

import json

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from benchmarks import coverage, coverage_page
from benchmarks.build_type import build, model_class
from benchmarks.cover_type import cover
from benchmarks.layers import layers_with_chains
from benchmarks.shrink import Policy, shrunk
from benchmarks.timm_families import families
from passes.analysis import analysis
from passes.capture import capture


def test_a_family_of_timm_is_its_smallest_model():
    pytest.importorskip("timm")
    assert "timm:resnet" in families()

    built = build("timm:resnet")

    assert list(built.inputs) == ["x"] and built.inputs["x"].shape == (2, 3, 128, 128)
    assert sum(p.numel() for p in built.model.parameters()) < 2_000_000


def test_families_of_timm_have_a_table_of_their_own():
    row = {"type": "timm:mlp", "stage": "done", "class": "Mlp", "nodes": 9}
    row |= {"groups": {"chain": 2}, "layers": {"mlp": [2, 2]}, "verified": {"chain": 1e-15}}

    text = coverage_page.page(coverage_page.kept([row, {**row, "type": "llama"}]) | {"note": ""})

    types, found = text.split("## Families of timm")
    assert "| llama | Mlp |" in types and "timm:" not in text
    assert "| mlp | Mlp |" in found and "| run | 1 |" in found


def test_products_of_sizes_survive_shrinking():
    small = shrunk(CONFIG_MAPPING["llama"](num_key_value_heads=8), Policy())

    assert small.num_hidden_layers == 2 and small.vocab_size == 128
    assert small.hidden_size == small.num_attention_heads * small.head_dim == 32
    assert (small.num_attention_heads, small.num_key_value_heads) == (8, 2)
    assert 2 < small.intermediate_size / small.hidden_size < 3


def test_every_kind_of_layer_stays():
    small = shrunk(CONFIG_MAPPING["zamba2"](), Policy())

    assert set(small.layers_block_type) == {"linear_attention", "hybrid"}
    assert len(small.layers_block_type) == small.num_hidden_layers == 2


def test_special_tokens_stay_apart_and_inside_the_vocabulary():
    config = CONFIG_MAPPING["qwen2_5_vl"]()
    small = shrunk(config, Policy())

    ids = [small.image_token_id, small.video_token_id, small.vision_start_token_id]
    assert len(set(ids)) == 3 and max(ids) < small.text_config.vocab_size


def test_equal_widths_stay_equal_across_configurations():
    small = shrunk(CONFIG_MAPPING["qwen2_5_vl"](), Policy())
    config = CONFIG_MAPPING["qwen2_5_vl"]()

    scale = config.text_config.hidden_size // small.text_config.hidden_size
    assert config.vision_config.out_hidden_size // small.vision_config.out_hidden_size == scale


@pytest.mark.parametrize(
    ("model_type", "name", "inputs"),
    [
        ("llama", "LlamaForCausalLM", {"input_ids"}),
        ("bert", "BertModel", {"input_ids"}),
        ("t5", "T5ForConditionalGeneration", {"input_ids", "decoder_input_ids"}),
        ("clip", "CLIPModel", {"input_ids", "pixel_values"}),
        ("whisper", "WhisperForConditionalGeneration", {"input_features", "decoder_input_ids"}),
    ],
)
def test_a_type_is_built_with_inputs_that_it_runs_on(model_type, name, inputs):
    built = build(model_type)

    assert type(built.model).__name__ == name == model_class(model_type).__name__
    assert set(built.inputs) == inputs
    assert sum(p.numel() for p in built.model.parameters()) < 1_000_000


def test_a_row_of_the_table():
    row = cover("llama")

    assert row["stage"] == "done" and coverage.captured(row) and coverage.why(row) == ""
    assert row["layers"] == {"mlp": [2, 2], "attention": [2, 2]}
    assert row["groups"]["chain"] == 4 and row["prunable"] > 0.5
    assert all(row["verified"][kind] <= 1e-9 for kind in ("chain", "bilinear", "head"))


def test_a_type_that_cannot_be_built_says_why():
    row = cover("no-such-type")

    assert row["stage"] == "build" and "no model class" in coverage.why(row)
    assert coverage.summary([row])["built"] == 0


def test_runs_go_on_where_they_stopped(tmp_path, monkeypatch, capsys):
    path = tmp_path / "rows.jsonl"
    done = {"type": "bert", "stage": "build", "reason": "kept from an earlier run"}
    path.write_text(json.dumps(done) + "\n")
    monkeypatch.setattr("sys.argv", ["coverage", "--types", "bert,gpt2", "--output", str(path)])

    coverage.main()

    rows = {row["type"]: row for row in coverage.read(path)}
    assert rows["bert"] == done and rows["gpt2"]["stage"] == "done"
    assert "GPT2LMHeadModel" in capsys.readouterr().out


class Two(nn.Module):
    """An MLP, then an MLP whose inner axis leaves the model: the second has no chain."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.gate, self.rise, self.fall = nn.Linear(6, 9), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(x)))
        inner = torch.sigmoid(self.gate(x)) * self.rise(x)
        return x + self.fall(inner), inner


def test_layers_without_a_chain_are_counted():
    program = capture(Two(), torch.randn(3, 6))

    deps = analysis(program.graph_module, program.inputs)
    found = layers_with_chains(program.graph_module, deps)
    assert found.counts == {"mlp": [1, 2], "attention": [0, 0]}
    assert found.without == {"mlp": {"frozen, reaches the model's output": 1}, "attention": {}}


def test_the_page_is_written_from_the_kept_results():
    results = json.loads(coverage_page.RESULTS.read_text())

    assert coverage_page.PAGE.read_text() == coverage_page.page(results)
    assert not any(row["wrong"] for row in results["rows"])


def test_what_is_kept_of_a_row(monkeypatch):
    monkeypatch.setattr(coverage_page, "types", lambda: ["bert", "gpt2", "none"])
    good = {"type": "bert", "class": "BertModel", "stage": "done", "nodes": 9, "prunable": 0.5}
    good |= {"groups": {"chain": 2, "frozen": 1}, "layers": {"mlp": [1, 1]}}
    bad = good | {"type": "gpt2", "verified": {"chain": "VerificationError: differ by 1 · node"}}
    kept = coverage_page.kept([good | {"verified": {"chain": 1e-15, "head": None}}, bad])

    assert [row["verified"] for row in kept["rows"]] == [True, False]
    assert [row["wrong"] for row in kept["rows"]] == [False, True]
    text = coverage_page.page(kept)
    assert "2 of 3 types were run" in text and "| wrong | 1 |" in text
    more = coverage_page.kept([good | {"type": "none"}, bad], kept["rows"], random=True)
    assert [(row["type"], row["random"]) for row in more["rows"]] == [
        ("bert", False),
        ("gpt2", True),
        ("none", True),
    ]
    assert "the 2 first of a random order" in coverage_page.page(more)
    assert "| chain: VerificationError: differ by # | 1 |" in text
