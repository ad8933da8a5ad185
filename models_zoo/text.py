"""The text that is on every machine: the source of the running interpreter's standard library.

    split(module) = sha256(module name) mod 100:  0-89 train, 90-94 calibration, 95-99 held-out

A module is wholly in one split, so no line of a held-out module was seen in training or
calibration.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sysconfig
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Split = Literal["train", "calibration", "heldout"]
_SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def split_of(module: str) -> Split:
    """The split of a module by the hash of its dotted name."""
    bucket = int.from_bytes(hashlib.sha256(module.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 90 else "calibration" if bucket < 95 else "heldout"


def documents(split: Split) -> list[str]:
    """Source texts of the standard library's modules in `split`, ordered by module name."""
    paths = ((name, path) for name, path in _modules().items() if split_of(name) == split)
    return [path.read_text(encoding="utf-8", errors="replace") for _, path in sorted(paths)]


@functools.cache
def _modules() -> dict[str, Path]:
    """The standard library's modules by dotted name; skipped folders are not entered."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {}
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if name not in _SKIP]
        for path in (Path(folder, file) for file in files if file.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            if not _SKIP.intersection(parts):
                found[".".join(parts)] = path
    return found


def token_stream(texts: list[str], tokenizer: Tokenizer) -> torch.Tensor:
    """One int64 vector: every text preceded by BOS and followed by EOS."""
    (bos,), (eos,) = (tokenizer.encode(t, add_special_tokens=False).ids for t in (BOS, EOS))
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += [bos, *encoding.ids, eos]
    return torch.tensor(ids)


def windows(stream: torch.Tensor, length: int, count: int | None = None) -> torch.Tensor:
    """[N, length] consecutive windows; with `count`, that many of them spread evenly."""
    rows = stream[: len(stream) // length * length].view(-1, length)
    if count is None or count >= len(rows):
        return rows.clone()
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()].clone()


def unigram_perplexity(train: torch.Tensor, heldout: torch.Tensor, vocabulary: int) -> float:
    """exp(-mean log p) of held-out tokens under add-one smoothed training frequencies."""
    counts = Counter(train.tolist())
    total = len(train) + vocabulary
    logs = [math.log((counts[token] + 1) / total) for token in heldout.tolist()]
    return math.exp(-sum(logs) / len(logs))
