"""A model that was pruned, loaded or trained since goes to disk again, by whatever a user calls."""

import copy
import json
import pickle
import shutil

import families
import pytest
import torch
import transformers
from torch import nn

import fasp_graph as fg
from fasp_graph.exports.export import _source_again as again
from fasp_graph.exports.onnx import onnx_session, run_session
from passes.compare import tensors


@pytest.fixture(scope="module")
def pruned():
    model, inputs, known = families.program("llama")
    return fg.prune(model, inputs, None, fg.Config(0.3, method="magnitude"), program=known)


@pytest.fixture(scope="module")
def saved(pruned, tmp_path_factory):
    return pruned.save(tmp_path_factory.mktemp("saved") / "small")


def numbers(model):
    return families.output(model.eval(), {"input_ids": torch.arange(3, 12)[None]})


def changed(model):
    """As after some training."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


def test_a_loaded_model_is_saved_with_the_weights_that_it_has_now(saved, tmp_path):
    model = changed(fg.load(saved))
    model.config.use_cache, model.generation_config.max_new_tokens = False, 7

    found = fg.load(fg.save(model, tmp_path / "again", facts={"perplexity after": 3.5}))

    assert torch.equal(numbers(found), numbers(model))
    assert not torch.equal(numbers(found), numbers(fg.load(saved)))
    assert (found.config.use_cache, found.generation_config.max_new_tokens) == (False, 7)
    card = (tmp_path / "again" / "README.md").read_text()
    assert card == (saved / "README.md").read_text() + "\n- perplexity after: 3.5\n"
    held = [json.loads((f / "fasp_graph.json").read_text()) for f in (saved, tmp_path / "again")]
    assert held[0]["plan"] == held[1]["plan"] and held[0]["report"] == held[1]["report"]


def test_a_loaded_model_replaces_its_own_folder(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "small")
    model = changed(fg.load(folder))

    fg.save(model, folder)

    assert torch.equal(numbers(fg.load(folder)), numbers(model))


def test_a_recovered_model_is_saved(saved, tmp_path):
    trained = fg.recover(fg.load(saved), [families.tokens()], lora=2)

    found = fg.load(fg.save(trained, tmp_path / "trained"))

    assert torch.equal(numbers(found), numbers(trained))


def test_a_class_of_the_users_own_is_saved_again(tmp_path):
    model = nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 5))
    result = fg.prune(model, torch.randn(3, 7), None, fg.Config(0.4, method="magnitude"))
    loaded = changed(fg.load(result.save(tmp_path / "one"), model))

    found = fg.load(fg.save(loaded, tmp_path / "two"), model)

    assert torch.equal(found[0].weight, loaded[0].weight)


@pytest.mark.parametrize("way", ["copied", "copied twice", "pickled"])
def test_save_pretrained_writes_what_loads(pruned, tmp_path, way):
    model = changed(copy.deepcopy(pruned.model))
    if way == "copied twice":
        model = copy.deepcopy(model)
    if way == "pickled":
        model = pickle.loads(pickle.dumps(model))
    mine = [tmp_path / name for name in ("notes.txt", "model_of_mine.safetensors")]
    for path in mine:
        path.write_text("mine")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("of another save")

    model.save_pretrained(tmp_path)

    assert torch.equal(numbers(fg.load(tmp_path)), numbers(model))
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(numbers(auto), numbers(model))
    assert all(path.read_text() == "mine" for path in mine)
    assert {path.name for path in tmp_path.glob("model*.safetensors")} == {
        *("model.safetensors", "model_of_mine.safetensors")
    }


def test_one_process_of_several_writes(pruned, tmp_path):
    pruned.model.save_pretrained(tmp_path / "small", is_main_process=False)

    assert not (tmp_path / "small").exists()


def test_a_model_that_nothing_holds_says_so(pruned, tmp_path):
    with pytest.raises(fg.FaspGraphError, match="the model is gone.*help: keep it in a variable"):
        copy.deepcopy(pruned.model).save_pretrained(tmp_path / "small")


def test_what_a_trainer_saves_loads_and_goes_on(pruned, tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (4, 9))]
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True}
    steps = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2}
    model = copy.deepcopy(pruned.model)
    options = transformers.TrainingArguments(str(tmp_path), **steps, **quiet)

    trainer = transformers.Trainer(model, options, train_dataset=rows)
    trainer.train()
    trainer.save_model()  # beside the checkpoints
    trained = numbers(model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    assert torch.equal(numbers(fg.load(tmp_path)), trained)
    assert torch.equal(numbers(fg.load(tmp_path / "checkpoint-2")), trained)
    assert not torch.equal(trained, numbers(pruned.model))


@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"push_to_hub": True}])
def test_save_pretrained_refuses_what_it_does_not_do(pruned, tmp_path, options):
    with pytest.raises(fg.FaspGraphError, match="of a pruned model writes no .* · help: leave it"):
        pruned.model.save_pretrained(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_a_loaded_model_is_exported(saved, tmp_path):
    model, x = fg.load(saved), families.tokens(2, 7)

    fg.export(model, tmp_path / "m.pt2", "pt2")

    (found, *_) = tensors(torch.export.load(tmp_path / "m.pt2").module()(**x))
    assert torch.allclose(found, families.output(model, x), atol=1e-5)


def test_a_loaded_model_is_analysed_for_its_cache(pruned, saved):
    model = fg.load(saved)

    source = again(model, None, cache=True)

    assert source.plan["kept"] == pruned.plan.to_dict()["kept"]
    assert {group.name for group in source.deps.groups} >= set(source.plan["kept"])
    assert again(model, None, cache=False).deps is None


def test_a_class_of_the_users_own_is_exported_at_the_inputs_that_are_given(tmp_path):
    model, x = nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(3, 7)
    result = fg.prune(model, x, None, fg.Config(0.4, method="magnitude"))
    loaded = changed(fg.load(result.save(tmp_path / "small"), model))

    fg.export(loaded, tmp_path / "m.onnx", inputs=x)
    fg.export_onnx(changed(result.model), tmp_path / "n.onnx")

    for name in ("m.onnx", "n.onnx"):
        (found,) = run_session(onnx_session(tmp_path / name), ((x,), {}))
        assert torch.allclose(found, loaded(x), atol=1e-5)
    with pytest.raises(
        fg.FaspGraphError, match="for which no example can be made · help: .* inputs="
    ):
        fg.export(loaded, tmp_path / "o.onnx")
    with pytest.raises(fg.FaspGraphError, match="a Pruned holds its inputs · help: leave"):
        fg.export(result, tmp_path / "o.onnx", inputs=x)


@pytest.mark.parametrize("call", [fg.save, fg.export, fg.export_onnx])
@pytest.mark.parametrize("given", [nn.Linear(2, 2), "small"])
def test_what_was_not_pruned_is_refused(tmp_path, call, given):
    with pytest.raises(fg.FaspGraphError, match=r"is no result of prune, load .* · help: give one"):
        call(given, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_weights_that_are_not_those_of_the_folder(saved, tmp_path):
    model = fg.load(saved)
    model.lm_head = nn.Linear(48, 7, bias=False)

    with pytest.raises(fg.FaspGraphError, match=r"lm_head.weight is not what the model had in"):
        fg.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_holds_another_pruning_by_now(pruned, saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "small")
    model = fg.load(folder)
    manifest = json.loads((folder / "fasp_graph.json").read_text())
    (folder / "fasp_graph.json").write_text(json.dumps({**manifest, "plan": {}}))

    with pytest.raises(fg.FaspGraphError, match="holds another pruning .* · help: load the model"):
        fg.save(model, tmp_path / "new")
    shutil.rmtree(folder)
    with pytest.raises(fg.FaspGraphError, match="holds another pruning .* or none"):
        model.save_pretrained(tmp_path / "new")


@pytest.mark.parametrize("layout", ["free", "uniform"])
@pytest.mark.parametrize("way", ["pruned", "loaded"])
def test_the_configuration_says_the_type_of_the_weights(tmp_path, layout, way):
    model, inputs, known = families.program("llama")
    config = fg.Config(0.3, method="magnitude", layout=layout)
    result = fg.prune(model, inputs, None, config, program=known)
    folder = tmp_path / "half"

    if way == "pruned":
        result.model.half()
        result.save(folder)
    else:
        fg.save(fg.load(result.save(tmp_path / "full")).half(), folder)

    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in plain.parameters()} == {torch.float16}
    assert plain.config.dtype == fg.load(folder).config.dtype == torch.float16
