"""transformers' Auto classes on folders of ours: each option is honoured or refused."""

import families
import pytest
import torch
import transformers

import fasp_graph as fg
from fasp_graph.folders import auto
from fasp_graph.folders.card import auto_class

Auto = transformers.AutoModelForCausalLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model, inputs, known = families.program("llama")
    model.set_attn_implementation("eager")
    result = fg.prune(model, inputs, None, fg.Config(0.3, method="magnitude"), program=known)
    return result.save(tmp_path_factory.mktemp("saved") / "small")


@pytest.mark.parametrize("dtype", ["float16", torch.float16])
def test_the_type_that_is_asked_for(folder, dtype):
    for options in ({"dtype": dtype}, {"torch_dtype": dtype}, {"dtype": {"": dtype}}):
        model = Auto.from_pretrained(folder, **options)

        assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert {p.dtype for p in Auto.from_pretrained(folder, dtype="auto").parameters()} == {
        torch.float32
    }


def test_the_attention_is_that_of_the_folder_or_what_is_asked_for(folder):
    assert fg.load(folder).config._attn_implementation == "eager"
    assert Auto.from_pretrained(folder).config._attn_implementation == "eager"

    model = Auto.from_pretrained(folder, attn_implementation="sdpa")
    assert model.config._attn_implementation == "sdpa"


def test_the_base_class_is_the_model_without_its_head(folder, tmp_path):
    x = families.tokens()

    base, whole = transformers.AutoModel.from_pretrained(folder), fg.load(folder)

    assert type(base) is type(whole.model)
    assert torch.equal(families.output(base, x), families.output(whole.model, x))
    with pytest.raises(fg.FaspGraphError, match="is not what the model had in"):
        base.save_pretrained(tmp_path / "base")  # of which no folder could be loaded
    assert not any(tmp_path.rglob("*.safetensors"))


def test_loading_information_and_devices(folder):
    for device in ("cpu", {"": "cpu"}, torch.device("cpu")):
        model, info = Auto.from_pretrained(folder, device_map=device, output_loading_info=True)

        assert not any(info.values()) and "missing_keys" in info
        assert model.device.type == "cpu"
    assert Auto.from_pretrained(folder, device_map="auto").device.type in ("cpu", "cuda")


def test_switches_of_a_run(folder):
    model = Auto.from_pretrained(folder, use_cache=False, output_hidden_states=True)

    found = model(**families.tokens())
    assert found.past_key_values is None and len(found.hidden_states) > 1
    plain = Auto.from_pretrained(folder)(**families.tokens())
    assert plain.past_key_values is not None and plain.hidden_states is None


def test_options_of_the_hub_reach_it(folder, monkeypatch):
    asked = {}

    def download(name, **options):
        asked[name] = options
        return str(folder.parent)

    monkeypatch.setattr(auto.huggingface_hub, "snapshot_download", download)
    made = Auto._model_mapping[auto.FaspConfig]
    hub = {"revision": "v1", "token": "t", "cache_dir": "c", "local_files_only": True}

    model = made.from_pretrained("me/small", subfolder="small", **hub)

    assert asked == {"me/small": hub}
    assert type(model).__name__ == "LlamaForCausalLM"


REFUSED = {
    "quantization": (
        {"quantization_config": {"quant_method": "awq"}},
        "quantization_config cannot be honoured",
    ),
    "unknown": ({"no_such_option": 3}, "no_such_option cannot be honoured for a pruned model"),
    "of the configuration": ({"output_attentions": True}, "output_attentions cannot be honoured"),
    "turned off": ({"tie_word_embeddings": False}, "tie_word_embeddings cannot be honoured"),
    "devices": ({"device_map": {"model": 0, "lm_head": "cpu"}}, "is no single device of this"),
    "several types": ({"dtype": {"": "float16", "model": "float32"}}, "is no type of torch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured(folder, case):
    options, message = REFUSED[case]

    with pytest.raises(fg.FaspGraphError, match=message):
        Auto.from_pretrained(folder, **options)


def test_a_type_that_torch_does_not_have(folder):
    made = Auto._model_mapping[auto.FaspConfig]

    with pytest.raises(fg.FaspGraphError, match="dtype='no_type' is no type of torch · help: name"):
        made.from_pretrained(folder, dtype="no_type")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt2", Auto.__name__),
        ("t5", "AutoModelForSeq2SeqLM"),
        ("vit", "AutoModelForImageClassification"),
        ("bert", "AutoModelForSequenceClassification"),
    ],
)
def test_the_auto_class_that_a_card_names(family, expected):
    assert auto_class(families.build(family)) == expected
