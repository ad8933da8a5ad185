"""Folders: round trip, ties, replacement, and what a hostile folder may not do."""

import copy
import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import families
import pytest
import torch
from programs_of_zoo import program
from torch import nn

import fasp_graph as fg
import models_zoo
from fasp_graph.data import load_target
from fasp_graph.folders import huggingface
from fasp_graph.folders.origin import Pruning
from fasp_graph.folders.settings import told_plain


@pytest.fixture(scope="module")
def pruned():
    entry, known = program("llama-random")
    config = fg.Config(sparsity=0.3)
    return fg.prune(entry.model, entry.inputs, entry.calibration, config, program=known)


@pytest.fixture(scope="module")
def saved(pruned, tmp_path_factory):
    return fg.save(pruned, tmp_path_factory.mktemp("saved") / "small")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "small")


def edit(folder, change):
    path = folder / "fasp_graph.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_round_trip(pruned, folder):
    loaded = fg.load(folder)

    saved = pruned.model.state_dict()
    assert type(loaded) is type(pruned.model) and not loaded.training
    assert set(loaded.state_dict()) == set(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.generation_config.to_dict() == pruned.model.generation_config.to_dict()


def test_what_the_folder_holds(pruned, folder):
    manifest = json.loads((folder / "fasp_graph.json").read_text())

    weights = (folder / "model.safetensors").read_bytes()
    assert manifest["weights"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert manifest["class"] == type(pruned.model).__name__
    assert sorted(path.name for path in folder.iterdir()) == manifest["files"]
    assert f"{pruned.report.params_after:,}" in (folder / "README.md").read_text()
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A decoder with tied weights, pruned, and its folder with a tokenizer."""
    entry, known = program("opt")
    config = fg.Config(method="magnitude", sparsity=0.2)
    result = fg.prune(entry.model, entry.inputs, None, config, program=known)
    folder = tmp_path_factory.mktemp("tied") / "small"
    return result, fg.save(result, folder, tokenizer=entry.tokenizer)


def test_tied_weights_are_stored_once_and_tied_again(tied):
    result, folder = tied

    loaded = fg.load(folder)

    state, aliases = huggingface.unique_state(result.model)
    assert len(aliases) == 1 and not set(aliases) & set(state)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert (folder / "tokenizer.json").is_file()


def test_an_earlier_folder_is_replaced(pruned, folder):
    (folder / "README.md").write_text("old")

    fg.save(pruned, folder)

    assert (folder / "README.md").read_text() != "old"
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


def test_an_earlier_folder_with_files_of_the_user_stays(pruned, folder):
    (folder / "notes.txt").write_text("mine")

    with pytest.raises(fg.FaspGraphError, match=r"notes\.txt"):
        fg.save(pruned, folder)

    assert (folder / "notes.txt").read_text() == "mine"


def test_a_failed_save_leaves_the_earlier_folder(pruned, folder):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    with pytest.raises(fg.FaspGraphError, match="disk full"):
        fg.save(pruned, folder, tokenizer=Broken())

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["small"]


HOSTILE = {
    "format": (lambda m: m.update(format=99), "format 99"),
    "no format": (lambda m: m.pop("format"), "format None"),
    "traversal": (lambda m: m["weights"].update({"../x.safetensors": ""}), "plain file name"),
    "absolute": (lambda m: m["weights"].update({"/etc/passwd": ""}), "plain file name"),
    "hash": (lambda m: m["weights"].update({"model.safetensors": "0" * 64}), "sha256"),
    "a function": (lambda m: m.update({"class": "pipeline"}), "not a model class"),
    "a module": (lambda m: m.update({"class": "utils"}), "not a model class"),
    "dotted": (lambda m: m.update({"class": "os.system"}), "not a model class"),
    "types": (lambda m: m.update(aliases=[]), "damaged"),
    "method": (lambda m: m["emission"]["attributes"].update({"": {"forward": 1}}), "no integer"),
    "huge": (lambda m: m["emission"]["shapes"].update({"lm_head.weight": [10**9, 9]}), "shape"),
    "alias": (lambda m: m["aliases"].update({"lm_head.bias": "nothing"}), "do not fit"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_altered_manifests_are_refused(folder, case):
    change, message = HOSTILE[case]
    edit(folder, change)

    with pytest.raises(fg.FaspGraphError, match=message):
        fg.load(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_altered_settings_are_refused(folder, name):
    """Another eps or token id is no error of any shape: only the hash tells."""
    path = folder / name
    held = json.loads(path.read_text())
    if name == "config.json":
        held["dense"]["rms_norm_eps"] = 0.5
    path.write_text(json.dumps({**held, "eos_token_id": 7}))
    with pytest.raises(fg.FaspGraphError, match=rf"{name} is not the file .* · help: fetch"):
        fg.load(folder)

    path.unlink()
    with pytest.raises(fg.FaspGraphError, match=rf"{name} is missing|no {name}"):
        fg.load(folder)


def test_settings_that_were_changed_on_purpose_load_without_their_line(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 7}))
    edit(folder, lambda m: m["settings"].pop(path.name))

    assert fg.load(folder).generation_config.eos_token_id == 7


def test_the_command_line_reads_no_altered_tokenizer(tied, tmp_path):
    folder = shutil.copytree(tied[1], tmp_path / "small")
    assert load_target(str(folder)).tokenizer is not None

    held = folder / "tokenizer_config.json"
    held.write_text(held.read_text().replace("{", '{"add_bos_token": true, ', 1))

    with pytest.raises(fg.FaspGraphError, match="tokenizer_config.json is not the file"):
        load_target(str(folder))
    assert isinstance(fg.load(folder), nn.Module)  # which reads no tokenizer


def test_a_loaded_model_keeps_its_tokenizer_but_no_altered_one(tied, tmp_path):
    folder = shutil.copytree(tied[1], tmp_path / "small")
    model = fg.load(folder)

    again = fg.save(model, tmp_path / "again")
    assert load_target(str(again)).tokenizer is not None

    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(fg.FaspGraphError, match="tokenizer.json is not the file that was saved"):
        fg.save(model, again)
    assert (again / "tokenizer.json").read_bytes() == (tied[1] / "tokenizer.json").read_bytes()


def test_what_is_no_folder(tmp_path):
    with pytest.raises(fg.FaspGraphError, match="holds no"):
        fg.load(tmp_path)
    (tmp_path / "fasp_graph.json").write_text("{")
    with pytest.raises(fg.FaspGraphError, match="not JSON"):
        fg.load(tmp_path)


def test_a_plain_module_needs_and_keeps_the_callers_instance(tmp_path):
    entry, known = program("resnet")
    config = fg.Config(sparsity=0.3)
    result = fg.prune(entry.model, entry.inputs, entry.calibration, config, program=known)
    folder = fg.save(result, tmp_path / "small")
    fresh = models_zoo.load("resnet").model
    shapes = {name: tensor.shape for name, tensor in fresh.state_dict().items()}

    loaded = fg.load(folder, model=fresh)

    assert {name: tensor.shape for name, tensor in fresh.state_dict().items()} == shapes
    assert sum(p.numel() for p in loaded.parameters()) == result.report.params_after
    with pytest.raises(fg.FaspGraphError, match="model="):
        fg.load(folder)


def test_folders_of_format_1_keep_loading():
    golden = Path(__file__).parent / "golden"
    expected = json.loads((golden / "folder-v1.json").read_text())

    loaded = fg.load(golden / "folder-v1")

    assert json.loads((golden / "folder-v1" / "fasp_graph.json").read_text())["format"] == 1
    with torch.no_grad():
        logits = loaded(torch.tensor(expected["input_ids"])).logits[0, -1]
    assert torch.allclose(logits, torch.tensor(expected["logits"]), atol=1e-5)


def test_the_card_states_data_and_perplexity(pruned, tmp_path):
    facts = {"calibration data": "WikiText-2", "perplexity before": 45.8, "perplexity after": 52.1}

    card = (fg.save(pruned, tmp_path / "small", facts=facts) / "README.md").read_text()

    assert all(f"- {key}: {value}" in card for key, value in facts.items())
    assert "://" not in card  # nothing that may lead nowhere


def test_the_card_lists_groups_and_says_what_was_not_told(pruned, folder):
    card = (folder / "README.md").read_text()

    group = pruned.report.groups[0]
    rows = [line for line in card.splitlines() if line.startswith("| `")]
    assert 0 < len(rows) < len(pruned.report.groups)  # layers that repeat share one
    assert any(f"| {group.kind} | {group.units} | " in row for row in rows)
    assert "- calibration data: not stated\n- perplexity: not measured\n" in card
    assert 'fg.load("path/to/this/folder")' in card and "from_pretrained" not in card


@pytest.fixture(scope="module")
def uniform():
    """A family's own class, its groups said by the configuration."""
    model, inputs, known = families.program("llama")
    config = fg.Config(sparsity=0.3, method="magnitude", layout="uniform")
    return fg.prune(model, inputs, None, config, program=known)


def test_the_card_of_a_folder_that_loads_plainly_names_its_auto_class(uniform, tmp_path):
    card = (uniform.save(tmp_path / "small") / "README.md").read_text()

    assert "AutoModelForCausalLM.from_pretrained(" in card and "fg.load" not in card
    assert not any("from_pretrained" in note for note in uniform.report.notes)


def test_a_configuration_that_says_the_shapes_but_not_the_numbers(tmp_path):
    model = copy.deepcopy(families.build("llama"))
    for layer in model.model.layers:
        layer.self_attn.scaling *= 2  # which no configuration says
    config = fg.Config(sparsity=0.3, method="magnitude", layout="uniform")

    result = fg.prune(model, families.tokens(), None, config)

    (note,) = [note for note in result.report.notes if "plain from_pretrained" in note]
    assert "no configuration was found with which LlamaForCausalLM computes the same" in note
    folder = result.save(tmp_path / "small")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "fasp_graph"


def test_a_uniform_layout_that_plain_from_pretrained_does_not_load(uniform):
    made = Pruning.of(uniform)
    name = next(iter(made.emission.ways))
    padded = dataclasses.replace(made.emission, ways={**made.emission.ways, name: "padded"})

    told = told_plain(uniform.model, dataclasses.replace(made, emission=padded))

    assert told_plain(uniform.model, made) is made
    assert f"group {name} became padded, since other code reads its" in told.report.notes[-1]


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_processor_files_come_from_the_folder_of_the_model(pruned, tmp_path, where, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    (source / "preprocessor_config.json").write_text("{}")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "thesis.json").write_text("{}")
    name, pruned.model.name_or_path = pruned.model.name_or_path, f"{tmp_path}/source"
    monkeypatch.setattr(pruned.model.config, "_name_or_path", f"{tmp_path}/source")
    if where == "elsewhere":
        pruned.model.name_or_path = "someone/model-on-a-hub"

    folder = fg.save(pruned, tmp_path / "small")
    pruned.model.name_or_path = name

    found = {path.name for path in folder.iterdir()}
    assert ("preprocessor_config.json" in found) == (where == "here")
    assert ("tokenizer_config.json" in found) == (where == "here")
    assert "thesis.json" not in found
    texts = [path.read_text() for path in folder.iterdir() if path.suffix in (".json", ".md")]
    assert not any(str(tmp_path) in text for text in texts)
    manifest = json.loads((folder / "fasp_graph.json").read_text())
    assert sorted(found) == manifest["files"]


def test_a_model_that_was_pruned_before_is_not_saved_as_a_folder_that_no_one_can_load(tmp_path):
    entry, known = program("llama-random")
    config = fg.Config(sparsity=0.2, method="magnitude")
    once = fg.prune(entry.model, entry.inputs, None, config, program=known)
    twice = fg.prune(fg.load(once.save(tmp_path / "once")), entry.inputs, None, config)

    with pytest.raises(fg.FaspGraphError, match=r"before it was pruned here.* · help: prune"):
        twice.save(tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_a_configuration_with_a_number_that_json_lacks(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(pruned.model.config, "limits", [0.0, float("inf")], raising=False)

    folder = pruned.save(tmp_path / "small")

    assert "dense" in json.loads((folder / "config.json").read_text())  # says what was dense
    assert fg.load(folder).config.limits == [0.0, float("inf")]


def test_experts_are_run_as_they_were_when_the_model_was_pruned(tmp_path):
    entry = models_zoo.load("mixtral")
    entry.model.set_experts_implementation("batched_mm")  # asks nothing of the number of experts
    config = fg.Config(sparsity=0.12, method="magnitude", kinds=("head",))
    pruned = fg.prune(entry.model, entry.inputs, None, config)

    loaded = fg.load(pruned.save(tmp_path / "small"))

    assert pruned.report.params_after < pruned.report.params_before
    with torch.no_grad():
        expected, found = pruned.model(**entry.inputs).logits, loaded(**entry.inputs).logits
    assert torch.equal(found, expected)
