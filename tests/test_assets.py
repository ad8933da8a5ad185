"""Real trained models and real text, where they lie beside the project; skipped elsewhere."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import fasp_graph as fg
from models_zoo.text import windows

ASSETS = Path(__file__).parents[2] / "shared" / "assets"


@pytest.mark.skipif(not ASSETS.is_dir(), reason="needs the trained models in ../shared/assets")
@pytest.mark.parametrize(
    ("name", "calibration", "heldout"),
    [
        ("stories260K-hf", "tinystories.txt", "tinystories.txt"),
        ("opt-wikitext-hf", "wikitext2-train.txt", "wikitext2-test.txt"),
    ],
)
@pytest.mark.parametrize("sparsity", [0.2, 0.3])
def test_fasp_beats_no_repair_and_magnitude(name, calibration, heldout, sparsity):
    import torch

    model = AutoModelForCausalLM.from_pretrained(ASSETS / name).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
    texts = [(ASSETS / "text" / p).read_text() for p in (calibration, heldout)]
    first, second = texts[0][:120_000], texts[1][-120_000:]
    rows, unseen = (
        windows(torch.tensor(tokenizer(t)["input_ids"]), 256, 48) for t in (first, second)
    )
    batches = [{"input_ids": r} for r in rows.split(16)]

    def after(**options):
        config = fg.Config(sparsity=sparsity, **options)
        small = fg.prune(model, {"input_ids": rows[:3, :17]}, batches, config)
        return fg.perplexity(small.model, unseen)

    dense, fasp = fg.perplexity(model, unseen), after(method="fasp")
    assert dense < fasp < after(method="wanda") < after(method="magnitude")
