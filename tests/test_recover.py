"""A short training after pruning: held-out loss falls, and what comes back is still a pruned
model.
"""

import json
import sys

import pytest
import torch
from programs_of_zoo import program
from torch import nn
from typer.testing import CliRunner

import fasp_graph as fg
import models_zoo
from fasp_graph.cli import app
from fasp_graph.losses import is_language_model, loss
from passes.compare import tensors

OPTIONS = {"tokens": 4000, "lora": 4, "learning_rate": 1e-2, "seed": 1}


def counting(start, rows):
    """Texts that count up from different numbers: easy to learn, and none is in two sets."""
    steps = torch.arange(rows)[:, None] * 2 + start
    return (steps + torch.arange(16)) % 60 + 5


@pytest.fixture(scope="module")
def entry():
    return program("llama-random")[0]


@pytest.fixture(scope="module")
def pruned(entry):
    config = fg.Config(sparsity=0.3, method="magnitude")
    known = program("llama-random")[1]
    return fg.prune(entry.model, entry.inputs, None, config, program=known)


@pytest.fixture(scope="module")
def batches():
    return [{"input_ids": part} for part in counting(0, 32).split(8)]


@pytest.fixture(scope="module")
def recovered(pruned, batches):
    return fg.recover(pruned, batches, **OPTIONS)


def test_heldout_loss_falls_and_the_shapes_stay(pruned, recovered):
    before, after = (fg.perplexity(p.model, counting(1, 20)) for p in (pruned, recovered))

    assert after < 0.5 * before
    assert type(recovered.model) is type(pruned.model)
    shapes = [{n: p.shape for n, p in m.model.named_parameters()} for m in (pruned, recovered)]
    assert shapes[0] == shapes[1]
    assert all(p.requires_grad for p in recovered.model.parameters())


def test_distillation_brings_the_dense_models_answers_nearer(entry, pruned, batches):
    found = fg.recover(pruned, batches, **OPTIONS, distill=entry.model, weight=1.0)

    with torch.no_grad():
        dense = entry.model(counting(1, 20)).logits
        before, after = (
            (p.model(counting(1, 20)).logits - dense).square().mean() for p in (pruned, found)
        )
    assert after < 0.7 * before


def test_the_graph_and_a_saved_folder_are_the_trained_model(recovered, tmp_path):
    args, kwargs = recovered.inputs

    loaded = fg.load(recovered.save(tmp_path / "small"))

    with torch.no_grad():
        expected = recovered.model(*args, **kwargs).logits
        graph = tensors(recovered.graph_module(*args, **kwargs))[0]
        assert torch.equal(loaded(*args, **kwargs).logits, expected)
    assert torch.allclose(graph, expected, rtol=1e-3, atol=1e-4)


def test_a_seed_repeats_a_run_and_the_pruned_model_is_untouched(pruned, batches, recovered):
    state = {name: p.clone() for name, p in pruned.model.named_parameters()}

    again = fg.recover(pruned, batches, **OPTIONS)

    for name, parameter in recovered.model.named_parameters():
        assert torch.equal(parameter, again.model.get_parameter(name)), name
    assert all(torch.equal(p, state[name]) for name, p in pruned.model.named_parameters())


def test_all_weights_of_any_model_learn_from_the_dense_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5)).eval()
    x = torch.randn(256, 6)
    small = fg.prune(model, x[:3], None, fg.Config(sparsity=0.5, method="magnitude"))

    found = fg.recover(small, x.split(32), 2048, lora=0, distill=model, learning_rate=1e-2)

    fresh = torch.randn(200, 6)
    with torch.no_grad():
        before, after = ((p.model(fresh) - model(fresh)).square().mean() for p in (small, found))
    assert after < 0.7 * before


def dense():
    """What the command line is given as the dense model."""
    entry = models_zoo.load("llama-random")
    return entry.model, entry.inputs, [{"input_ids": counting(0, 4)}]


def test_the_command_writes_a_folder_that_loads(pruned, tmp_path):
    pruned.save(tmp_path / "small")
    model, output = f"{__name__}:dense", tmp_path / "better"
    call = ["recover", str(tmp_path / "small"), "--output", str(output), "--distill", model]

    done = CliRunner().invoke(
        app, [*call, "--tokens", "64", "--lora", "2", "--learning-rate", "1e-3", "--json"]
    )

    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["folder"] == str(output) and (said["steps"], said["tokens"]) == (1, 64)
    assert said["loss_first"] == said["loss_last"] > 0
    before, after = (fg.load(tmp_path / name) for name in ("small", "better"))
    changed = [
        n for n, p in before.named_parameters() if not torch.equal(p, after.get_parameter(n))
    ]
    assert changed and not any("norm" in n or "embed" in n for n in changed)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data": []}, "at least one batch"),
        ({"tokens": 0}, "tokens=0"),
        ({"lora": -1}, "lora=-1, .* out of range · help: lora is a rank"),
        ({"lora": 1.5}, "lora=1.5, .* not whole numbers · help: lora is a rank"),
        ({"tokens": "9"}, "tokens='9': not whole numbers · help: lora is a rank"),
        ({"learning_rate": float("nan")}, "learning_rate=nan: out of range · help: lora is"),
        ({"distill": "dense"}, "distill='dense' is no model · help: distill=the dense nn.Module"),
        ({}, "no language model"),
    ],
)
def test_what_cannot_be_recovered_is_refused(given, message):
    model, options = nn.Sequential(nn.Linear(4, 4)), {"data": [torch.randn(2, 4)], **given}

    with pytest.raises(fg.FaspGraphError, match=message):
        fg.recover(model, **options)


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)

    with pytest.raises(fg.FaspGraphError, match=r"pip install 'fasp-graph\[recover\]'"):
        fg.recover(nn.Sequential(nn.Linear(4, 4)), [torch.randn(2, 4)], distill=nn.Linear(4, 4))


def test_a_foreign_folder_is_refused_before_training(pruned, tmp_path, monkeypatch):
    pruned.save(tmp_path / "small")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    monkeypatch.setattr("fasp_graph.commands.recovering.load_target", None)  # would be work

    call = ["recover", str(tmp_path / "small"), "--output", str(tmp_path / "mine")]
    error = CliRunner().invoke(app, call).exception

    assert isinstance(error, fg.FaspGraphError) and "no fasp_graph folder" in str(error)


class Masked(nn.Module):
    """Logits of every token, for all of which it reads all of them."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)

    def forward(self, input_ids):
        held = self.embed(input_ids)
        return self.head(held + held.mean(1, keepdim=True))


def test_a_model_that_reads_later_tokens_is_not_taught_the_next_one():
    ids = torch.arange(24).reshape(2, 12) % 9
    assert not is_language_model(Masked(), (ids,), {})
    assert is_language_model(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9)), (ids,), {})
    with pytest.raises(fg.FaspGraphError, match="no language model: its outputs do not say"):
        fg.recover(Masked(), [ids], lora=0)


def test_hidden_tokens_are_not_learnt():
    model = program("llama-random")[0].model
    ids, mask = counting(0, 2), torch.ones(2, 16, dtype=torch.int64)
    mask[:, 9:] = 0
    others = torch.where(mask > 0, ids, 3)
    one, other = (
        loss(model, model, (), {"input_ids": held, "attention_mask": mask}, 0.5, True)
        for held in (ids, others)
    )
    assert float(one.detach()) == float(other.detach())
