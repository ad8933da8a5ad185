"""Accuracy, embedding similarity and what `eval` says of them."""

import json
import sys

import pytest
import torch
from torch import nn

import fasp_graph as fg
import models_zoo
from fasp_graph.commands.measuring import eval_command
from fasp_graph.data import windows_of
from fasp_graph.measures import accuracy, embeddings, similarity, tasks
from fasp_graph.quality import Quality
from fasp_graph.targets import Target, model_of
from passes.compare import tensors


class Encoder(nn.Module):
    """Ids -> states [batch, length, 2]."""

    def __init__(self, rows):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.tensor(rows))

    def forward(self, input_ids, attention_mask=None):
        return self.table(input_ids)


class Spaces:
    """A tokenizer: a word is its number."""

    def __call__(self, text, **options):
        return {"input_ids": [int(word) for word in text.split()]}


def classifier():
    """The class is the sign of the first pixel."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[1].weight[1, 0] = 1.0
    return model, torch.randn(2, 3, 2, 2)


def labelled():
    return [(torch.tensor([1.0, -1.0, 2.0])[:, None, None, None].expand(3, 3, 2, 2),
             torch.tensor([1, 0, 0]))]  # fmt: skip


def test_accuracy_counts_samples_and_not_batches():
    model, _ = classifier()
    good = (torch.ones(1, 3, 2, 2), torch.tensor([1]))

    assert accuracy(model, [*labelled(), good]) == pytest.approx(3 / 4)


def test_accuracy_refuses_what_has_no_classes():
    with pytest.raises(fg.FaspGraphError, match="labels"):
        accuracy(nn.Identity(), [(torch.zeros(2, 3, 4), torch.zeros(2))])
    with pytest.raises(fg.FaspGraphError, match="no samples"):
        accuracy(nn.Identity(), [])


def test_embeddings_are_means_over_what_the_mask_keeps():
    model = Encoder([[3.0, 0.0], [0.0, 4.0], [7.0, 7.0]])
    batch = {"input_ids": torch.tensor([[0, 1, 2]]), "attention_mask": torch.tensor([[1, 1, 0]])}

    assert torch.allclose(embeddings(model, [batch]), torch.tensor([[0.6, 0.8]]))


def test_similarity_is_the_cosine():
    batch = {"input_ids": torch.tensor([[0], [1]])}
    dense, other = Encoder([[1.0, 0.0], [0.0, 1.0]]), Encoder([[3.0, 0.0], [1.0, 0.0]])

    assert similarity(dense, dense, [batch]) == pytest.approx(1.0)
    assert similarity(other, dense, [batch]) == pytest.approx(0.5)


def test_overlapping_windows_count_every_token_once():
    entry = models_zoo.load("llama-random")
    ids = torch.randint(3, 90, (11,), generator=torch.Generator().manual_seed(0))
    rows = windows_of(" ".join(map(str, ids.tolist())), Spaces(), 5, None, stride=2)

    found = fg.perplexity(entry.model, rows, batch=3, stride=2)

    assert [row.tolist() for row in rows] == [ids[i : i + 5].tolist() for i in (0, 2, 4, 6)]
    losses = []
    with torch.no_grad():
        for number, row in enumerate(rows):
            logs = entry.model(row[None]).logits[0].log_softmax(-1)
            first = 1 if number == 0 else 3
            losses += [-logs[t - 1, row[t]] for t in range(first, 5)]
    assert len(losses) == 10
    assert found == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)


@pytest.mark.parametrize("stride", [0, 5, -1])
def test_a_stride_outside_the_window_is_refused(stride):
    with pytest.raises(fg.FaspGraphError, match="stride"):
        fg.perplexity(nn.Identity(), torch.zeros(2, 5, dtype=torch.long), stride=stride)


def test_eval_states_its_protocol(capsys):
    eval_command("zoo:llama-random", data=f"{__name__}:tokens", json=True)

    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] > 1
    assert {k: found[k] for k in ("samples", "sequence_length", "stride", "dtype")} == {
        "samples": 3,
        "sequence_length": 8,
        "stride": 8,
        "dtype": "float32",
    }


def tokens():
    return torch.arange(24).view(3, 8) + 3


def test_eval_measures_a_classifier(capsys):
    eval_command(f"{__name__}:classifier", data=f"{__name__}:labelled", json=True)

    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == pytest.approx(2 / 3) and found["samples"] == 3


def test_a_folder_of_classes_is_read_in_the_order_of_their_names(tmp_path):
    from PIL import Image

    for name, level in (("a-dark", 0), ("b-light", 255)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (5, 4), (level,) * 3).save(tmp_path / name / "x.png")
    model, inputs = classifier()

    found = Quality(Target("m", model, inputs), str(tmp_path), None, 8, 8, None).measure()

    assert found == {"accuracy": 1.0, "samples": 2, "dtype": "float32"}


def test_an_encoder_is_compared_with_its_reference(tmp_path):
    (tmp_path / "text.txt").write_text("0 1 1 0 1 0 0 1")
    model = Encoder([[1.0, 0.0], [0.0, 1.0]])
    target = Target("m", model, {"input_ids": torch.zeros(1, 2).long()}, tokenizer=Spaces())

    found = Quality(target, str(tmp_path / "text.txt"), f"{__name__}:encoder", 4, 8, None).measure()

    assert found["embedding_similarity"] == pytest.approx(1.0)
    assert (found["samples"], found["sequence_length"]) == (2, 4)


def encoder():
    return Encoder([[1.0, 0.0], [0.0, 1.0]]), {"input_ids": torch.zeros(1, 2).long()}


def test_tasks_without_the_harness_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)

    with pytest.raises(fg.FaspGraphError, match=r"fasp-graph\[evaluation\]"):
        tasks(nn.Identity(), None, ["arc_easy"], None)


class Mean(nn.Module):
    """Logits [B, T, 9] of all tokens, or of those before alone."""

    def __init__(self, later):
        super().__init__()
        self.embed, self.head, self.later = nn.Embedding(9, 8), nn.Linear(8, 9), later

    def forward(self, input_ids):
        held = self.embed(input_ids)
        mean = held.mean(1, keepdim=True) if self.later else held.cumsum(1)
        return self.head(held + mean)


@pytest.mark.parametrize("later", [True, False])
def test_eval_notes_a_perplexity_of_a_model_that_reads_later_tokens(later):
    rows = torch.arange(36).reshape(3, 12) % 9
    target = Target("m", Mean(later), (rows[:1],), heldout=rows)
    found = Quality(target, None, None, 12, 3, None).measure()

    assert ("note" in found) == later and found["perplexity"] > 1


def test_a_model_of_two_sequences_has_no_perplexity_and_that_is_no_bug_of_ours():
    two = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(fg.FaspGraphError, match="token ids alone, .1, 3., and it fails: TypeError"):
        fg.perplexity(two, torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "ViTForImageClassification"])
def test_a_folder_is_of_the_class_whose_weights_it_holds(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    kind = getattr(transformers, name)
    sizes = {"image_size": 8, "patch_size": 4} if name.startswith("ViT") else {"vocab_size": 32}
    dense = kind(kind.config_class(**small, **sizes, num_attention_heads=2)).eval()
    dense.save_pretrained(tmp_path)
    found = model_of(str(tmp_path))

    assert type(found.model) is kind
    with torch.no_grad():
        pair = (tensors(held(**found.inputs))[0] for held in (dense, found.model))
    assert torch.equal(*pair)
