"""Quantised, half-precision, adapted and tied models: refused with a way out, or taken exactly."""

import copy
import json
import types

import families
import pytest
import torch
from torch import nn

import fasp_graph as fg
from fasp_graph.data import load_target
from fasp_graph.inputs import refuse_unmergeable

X = torch.linspace(-1, 1, 28).view(4, 7)


def run(model):
    return fg.prune(model, X, [X], fg.Config(sparsity=0.3, method="fasp"))


def by_torch(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    wide = nn.Sequential(nn.Linear(7, 64), nn.ReLU(), nn.Linear(64, 5))
    quantization.quantize_(wide, quantization.Int8WeightOnlyConfig())
    return wide


def by_bitsandbytes(model):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model[2] = bitsandbytes.nn.Linear4bit(16, 12).to("cpu")
    return model


def by_transformers(model):
    model.config = types.SimpleNamespace(quantization_config={"quant_method": "gptq"})
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quantise", [by_torch, by_torchao, by_bitsandbytes, by_transformers])
def test_quantised_models_are_refused(mlp, quantise):
    with pytest.raises(fg.FaspGraphError, match="original precision, then quantise"):
        run(quantise(mlp))


def test_quantised_folders_are_refused_as_such(tmp_path):
    model, _, _ = families.program("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))

    for stream in (False, True):
        with pytest.raises(fg.FaspGraphError, match=r"quantised \(awq\).*original precision"):
            refuse_unmergeable(load_target(str(tmp_path), stream=stream).model)


def test_low_rank_adapters_must_be_merged(mlp):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(mlp), config)

    with pytest.raises(fg.FaspGraphError, match=r"merge_and_unload\(\)"):
        run(adapted)

    merged = adapted.merge_and_unload()
    assert run(merged).report.params_after < sum(p.numel() for p in mlp.parameters())


def test_adapters_that_could_be_unmerged_are_refused():
    peft = pytest.importorskip("peft")
    model, inputs, _ = families.program("llama")
    config = peft.LoraConfig(target_modules=["v_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    adapted.merge_adapter()

    said = r"holds an adapter that was .* still there · help: call merge_and_unload\(\)"
    for held in (adapted, adapted.get_base_model()):  # as add_adapter of transformers leaves it
        with pytest.raises(fg.FaspGraphError, match=said):
            fg.prune(held, inputs, None, fg.Config(method="magnitude"))

    refuse_unmergeable(adapted.merge_and_unload())


def prefixes(peft):
    return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


def prompts(peft):
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


def prompts_in_attention(peft):
    return peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1)


@pytest.mark.parametrize("tuning", [prefixes, prompts, prompts_in_attention])
def test_prompts_that_cannot_be_merged_are_refused(tuning):
    peft = pytest.importorskip("peft")
    model, inputs, _ = families.program("llama")
    tuned = peft.get_peft_model(copy.deepcopy(model), tuning(peft))

    with pytest.raises(fg.FaspGraphError, match=r"cannot be merged .* help: .*get_base_model\(\)"):
        fg.prune(tuned, inputs, None, fg.Config(method="magnitude"))

    if tuning is not prompts_in_attention:
        refuse_unmergeable(tuned.get_base_model())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_stay_in_it(dtype):
    model, inputs, _ = families.program("llama")
    model = copy.deepcopy(model).to(dtype)
    batches = [families.tokens(4, 11)]

    result = fg.prune(model, inputs, batches, fg.Config(sparsity=0.3, method="fasp"))

    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert set(result.emission.ways.values()) <= {"native", "attributes", "adapter"}
    assert result.report.bytes_after == 2 * result.report.params_after
    assert families.output(result.model, inputs).isfinite().all()


def test_tied_weights_stay_tied():
    result = families.pruned("opt")

    model = result.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert sum(p.numel() for p in model.parameters()) == result.report.params_after
