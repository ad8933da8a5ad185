"""The parts of an encoder-decoder as modules, which call the model's own code.

A cache holds, layer by layer, the decoder's key and value and then the encoder's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from .caching import filled, flat

T = TypeVar("T")


class Encoder(nn.Module):
    """The encoder alone; `main`: its input's name."""

    def __init__(self, model: nn.Module, main: str) -> None:
        super().__init__()
        self.model, self.main = model, main

    def forward(self, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """last_hidden_state."""
        more = {} if mask is None else {"attention_mask": mask}
        encoder: Any = self.model.get_encoder()  # type: ignore[operator]
        found: Tensor = encoder(**{self.main: value}, **more).last_hidden_state
        return found


class First(nn.Module):
    """The first tokens: keys and values of the encoder are computed too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, hidden: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """logits, and per layer the decoder's key and value, then the encoder's."""
        own, others = filled([]), filled([])
        logits = _decode(self.model, ids, hidden, own, others, mask)
        pairs = zip(_pairs(flat(own)), _pairs(flat(others)), strict=True)
        return logits, [tensor for mine, theirs in pairs for tensor in (*mine, *theirs)]


class Next(nn.Module):
    """Later tokens; `width`: of the encoder's states, which the layers do not read any more."""

    def __init__(self, model: nn.Module, width: int) -> None:
        super().__init__()
        self.model, self.width = model, width

    def forward(
        self, ids: Tensor, past: list[Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """logits, and per layer the decoder's key and value."""
        own = filled(own_of(past))
        others = filled([tensor for k, tensor in enumerate(past) if k % 4 >= 2])
        hidden = past[2].new_zeros(past[2].shape[0], past[2].shape[2], self.width)
        return _decode(self.model, ids, hidden, own, others, mask), flat(own)


def _decode(
    model: Any, ids: Tensor, hidden: Tensor, own: Any, others: Any, mask: Tensor | None
) -> Tensor:
    from transformers.cache_utils import EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput

    more = {} if mask is None else {"attention_mask": mask}
    found: Tensor = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
        decoder_input_ids=ids,
        past_key_values=EncoderDecoderCache(own, others),
        use_cache=True,
        **more,
    ).logits
    return found


def _pairs(tensors: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


def own_of(cached: Sequence[T]) -> list[T]:
    """What belongs to keys and values of the decoder's tokens; the others are the encoder's."""
    return [item for k, item in enumerate(cached) if k % 4 < 2]
