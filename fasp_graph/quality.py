"""What `eval` says of a model's quality: the measure that fits the model and its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from passes.errors import ConfigError

from .corpora import image_files, is_factory, made, refuse_missing, text_of
from .data import image_inputs, like, load_target, refuse_long, windows_of
from .evaluate import call_with_tokens, logits_of, perplexity, reads_later, spread
from .measures import accuracy, similarity
from .targets import Target

READS_LATER = (
    "the model reads later tokens too, as masked models and encoders do: this figure is no "
    "perplexity of the next token · help: --reference MODEL for the similarity of embeddings"
)


@dataclass(frozen=True)
class Quality:
    """Figures with their protocol: how many windows or samples, how long, how far apart, dtype."""

    target: Target
    data: str | None
    reference: str | None
    length: int
    windows: int
    stride: int | None

    def measure(self) -> dict[str, Any]:
        """No data: the model's own held-out text, if it has any."""
        found = self._measured()
        if self.stride is not None and "stride" not in found:
            raise ConfigError(
                "--stride is of windows that perplexity is measured on, and none is · help: "
                "--data TEXT, or leave --stride out"
            )
        return found

    def _measured(self) -> dict[str, Any]:
        if self.reference is not None:
            return self._similarity(self.reference)
        if self.data is not None and image_files(self.data):
            return self._accuracy(self._labelled(Path(self.data)))
        found = self._made()
        if found is not None and not isinstance(found, torch.Tensor):
            return self._accuracy(found)
        return self._perplexity(found)

    def _made(self) -> Any:
        """What a factory returns: tokens, or batches with labels."""
        if self.data is None or not is_factory(self.data) or Path(self.data).exists():
            return None
        found = made(self.data)
        pairs = isinstance(found, (list, tuple)) and all(map(_is_pair, found))
        if not pairs and not (isinstance(found, torch.Tensor) and found.dim() == 2):
            raise ConfigError(
                f"{self.data} returned {type(found).__name__} · help: --data takes a function that "
                "returns ids [windows, length], or a list of pairs (inputs, labels)"
            )
        return found

    def _perplexity(self, tokens: Any) -> dict[str, Any]:
        if tokens is None and self.data is not None:
            tokens = self._windows(self.data)
        elif tokens is None and self.target.heldout is not None:
            tokens = spread(self.target.heldout, self.windows)
        if tokens is None:
            return {}
        model, few = self.target.model, tokens[:1].to(next(self.target.model.parameters()).device)
        ahead = reads_later(lambda ids: logits_of(call_with_tokens(model, ids)), few)
        overlap = None if self.stride in (None, tokens.shape[1]) else self.stride
        return {
            "perplexity": perplexity(model, tokens, stride=overlap),
            **self._protocol(len(tokens)),
            "sequence_length": tokens.shape[1],
            "stride": self.stride or tokens.shape[1],
            **({"note": READS_LATER} if ahead else {}),
        }

    def _windows(self, data: str) -> Any:
        refuse_missing(data)
        if self.target.tokenizer is None:
            raise ConfigError(self._mute())
        refuse_long(self.target, self.length)
        text = text_of(data, evaluation=True)
        spread = self.stride is None  # windows that overlap have to lie side by side
        rows = windows_of(
            text,
            self.target.tokenizer,
            self.length,
            self.windows if spread else None,
            data,
            self.stride,
        )
        return rows[: self.windows]

    def _similarity(self, reference: str) -> dict[str, Any]:
        if self.data is None:
            raise ConfigError("--reference needs --data, the text to embed · help: --data FILE.txt")
        dense = load_target(reference)
        tokenizer = self.target.tokenizer or dense.tokenizer
        if tokenizer is None:
            raise ConfigError(self._mute())
        refuse_long(self.target, self.length)
        text = text_of(self.data, evaluation=True)
        rows = windows_of(text, tokenizer, self.length, self.windows, self.data)
        batches = [like(self.target.inputs, part) for part in rows.split(8)]
        return {
            "embedding_similarity": similarity(self.target.model, dense.model, batches),
            **self._protocol(len(rows)),
            "sequence_length": self.length,
        }

    def _accuracy(self, batches: list[Any]) -> dict[str, Any]:
        found = {"accuracy": accuracy(self.target.model, batches)}
        return found | self._protocol(sum(len(labels) for _, labels in batches))

    def _labelled(self, folder: Path) -> list[Any]:
        """(inputs, labels): the classes are the folders in it, in the order of their names."""
        classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if not classes:
            raise ConfigError(f"{folder} holds no folder for each class · help: CLASS/IMAGE")
        found = []
        for label, name in enumerate(classes):
            for batch in image_inputs(self.target, image_files(str(folder / name))):
                rows = len(pytree.tree_leaves(batch)[0])
                found.append((batch, torch.full((rows,), label)))
        return found

    def _mute(self) -> str:
        return (
            f"{self.target.name} has no tokenizer, so it cannot read text · help: put its "
            "tokenizer's files into the folder, or --data package.module:factory"
        )

    def _protocol(self, samples: int) -> dict[str, Any]:
        parameter = next(self.target.model.parameters(), torch.zeros(()))
        return {"samples": samples, "dtype": str(parameter.dtype).removeprefix("torch.")}


def _is_pair(batch: Any) -> bool:
    """Whether it is (inputs, labels)."""
    pair = isinstance(batch, (list, tuple)) and len(batch) == 2
    return pair and isinstance(batch[1], torch.Tensor)
