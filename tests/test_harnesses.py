"""Other projects' loaders take a saved folder, given only `import fasp_graph`; skipped where they
are not installed.
"""

import pytest
import torch
import transformers as tf
from families import output

import fasp_graph as fg
import models_zoo


def test_lm_eval_takes_the_folder(tmp_path):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance")
    entry = models_zoo.load("llama")
    result = fg.prune(entry.model, entry.inputs, None, fg.Config(method="magnitude"))
    folder = fg.save(result, tmp_path / "small", tokenizer=entry.tokenizer)

    harness = huggingface.HFLM(pretrained=str(folder), device="cpu", dtype="float32")
    text = ("def main(", "self):\n    return")
    request = instance.Instance("loglikelihood", {}, text, 0)
    ((found, _),) = harness.loglikelihood([request], disable_tqdm=True)

    first, whole = (entry.tokenizer(t)["input_ids"] for t in (text[0], "".join(text)))
    logits = output(result.model, {"input_ids": torch.tensor([whole])})[0].log_softmax(-1)
    expected = sum(float(logits[i - 1, whole[i]]) for i in range(len(first), len(whole)))
    assert type(harness.model) is type(result.model)
    assert found == pytest.approx(expected, rel=1e-4)


def test_sentence_transformers_takes_the_folder(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    tokenizer = models_zoo.load("llama").tokenizer
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = tf.BertModel(config).eval()
    inputs = {"input_ids": torch.randint(3, len(tokenizer), (3, 11))}
    result = fg.prune(model, inputs, [inputs], fg.Config(method="fasp"))
    folder = fg.save(result, tmp_path / "small", tokenizer=tokenizer)

    encoder = library.SentenceTransformer(str(folder), device="cpu")  # mean pooling
    found = torch.from_numpy(encoder.encode(["return self", "import os"], batch_size=1))

    for text, vector in zip(["return self", "import os"], found, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert torch.allclose(
            vector, output(result.model, {"input_ids": ids})[0].mean(0), atol=1e-5
        )
