"""The registry: every entry runs, seeded and in eval mode; the trained ones know their text."""

import itertools
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fasp_graph as fg
import models_zoo
from fasp_graph.evaluate import size_of
from models_zoo import pretrained, text
from models_zoo.train import CONTEXT, DATA, Settings, heldout_perplexity, train
from passes.capture import as_args
from passes.compare import tensors

TRAINED = ("llama", "opt")
RANDOM = [name for name in models_zoo.names() if name not in TRAINED]


def run(model, inputs):
    args, kwargs = as_args(inputs)
    with torch.no_grad():
        return tensors(model(*args, **kwargs))[0]


def trained(name):
    if not (DATA / name / "model.safetensors").exists():
        pytest.skip(f"no bundled weights: run `python -m models_zoo.train {name}`")
    return models_zoo.load(name)


def test_names_are_the_promised_ones():
    assert [*TRAINED, *RANDOM] == models_zoo.names()
    assert {"opt-random", "llama-random", "gpt2", "gpt-neox", "phi3"} <= set(RANDOM)
    assert {"bert", "vit", "resnet"} <= set(RANDOM)


def test_no_module_is_in_two_splits_and_each_part_reads_its_own(monkeypatch):
    parts = {split: set(text.documents(split)) for split in ("train", "calibration", "heldout")}
    sizes = {split: len(part) for split, part in parts.items()}
    assert sizes["train"] > 10 * sizes["heldout"] > 0 and sizes["calibration"] > 0
    for left, right in itertools.combinations(parts, 2):
        same = parts[left] & parts[right]
        assert len("".join(same)) < 2_000, (left, right)  # empty and generated modules

    monkeypatch.setattr(pretrained, "documents", lambda split: [split * 4_000])
    entry = pretrained.llama()
    read = [entry.tokenizer.decode(rows[0]) for rows in (entry.calibration[0]["input_ids"],)]
    assert "calibration" in read[0] and "heldout" in entry.tokenizer.decode(entry.heldout[0])


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(KeyError) as caught:
        models_zoo.load("no-such-model")

    assert "no-such-model" in str(caught.value)
    assert all(name in str(caught.value) for name in models_zoo.names())


@pytest.mark.parametrize("name", RANDOM)
def test_random_model_runs(name):
    entry = models_zoo.load(name)

    assert entry.name == name
    assert models_zoo.MODELS[name] == (type(entry.model).__name__, size_of(entry.model)[0])
    assert not any(module.training for module in entry.model.modules())
    assert sum(p.numel() for p in entry.model.parameters()) < 300_000
    assert entry.heldout is None and entry.tokenizer is None
    assert len(entry.calibration) == 4
    for batch in [entry.inputs, *entry.calibration]:
        output = run(entry.model, batch)
        assert output.shape[0] == 3
        assert output.isfinite().all()
        assert output.std() > 0.1


@pytest.mark.parametrize("name", RANDOM)
def test_random_model_is_the_same_each_time(name):
    first, again = models_zoo.load(name), models_zoo.load(name)

    assert torch.equal(run(first.model, first.inputs), run(again.model, again.inputs))


@pytest.mark.parametrize("name", RANDOM)
def test_vectors_are_off_their_defaults(name):
    model = models_zoo.load(name).model

    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert parameter.std() > 0, key
    for key, buffer in model.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            assert buffer.std() > 0, key


@pytest.mark.parametrize("name", TRAINED)
def test_trained_model_knows_its_text(name):
    entry = trained(name)
    facts = json.loads((DATA / name / "training.json").read_text())

    assert models_zoo.MODELS[name] == (type(entry.model).__name__, size_of(entry.model)[0])
    assert (DATA / name / "model.safetensors").stat().st_size <= 8_000_000
    assert all(p.dtype == torch.float32 for p in entry.model.parameters())
    assert not entry.model.training
    assert entry.heldout.dtype == torch.int64
    assert entry.heldout.shape[1] == 256 and len(entry.heldout) <= 96
    assert sum(len(batch["input_ids"]) for batch in entry.calibration) == 64
    least = facts["unigram_perplexity"] / 25  # 21.9; llama has 13.8, opt 18.7
    assert facts["heldout_perplexity"] < least
    assert fg.perplexity(entry.model, entry.heldout[::6]) < least


def test_tokenizer_decodes_what_it_encodes():
    tokenizer = trained("llama").tokenizer
    text = "def fünf(x):\n\treturn x ** 2  # naïve\n"

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_training_learns_and_is_the_same_each_time():
    settings = Settings("llama", epochs=20.0, batch=4, learning_rate=3e-2, warmup=2, autocast=False)
    stream = torch.arange(7).repeat(6 * CONTEXT)[: 20 * CONTEXT + 1]

    def trained():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=7,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        )
        train(model, stream, settings)
        return model

    model, again = trained(), trained()

    assert heldout_perplexity(model, stream[: 2 * CONTEXT].reshape(2, CONTEXT)) < 2
    for left, right in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right)
