"""state: what a forward remembers (buffers it writes into, attributes it sets) stays as it was.

A run that the compiler makes for itself leaves no trace: each starts where the user's model stands,
and so does the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .functional import is_inplace
from .lazy import Lazy


@contextmanager
def steady(*modules: Any) -> Iterator[None]:
    """After the block, buffers and attributes of the modules (others are ignored) are as before."""
    holders = [
        holder
        for module in modules
        if isinstance(module, nn.Module) and not _writes_nothing(module)
        for holder in module.modules()
    ]
    before = [(h, dict(vars(h)), dict(h._buffers)) for h in holders]
    tensors = {id(t): t for _, *held in before for d in held for t in d.values() if _written(t)}
    numbers = [(t, t._version, t.clone()) for t in tensors.values()]
    lists = [(v, v[:]) for _, held, _ in before for v in held.values() if type(v) is list]
    try:
        yield
    finally:
        for holder, attributes, buffers in before:
            for there, was in ((vars(holder), attributes), (holder._buffers, buffers)):
                there.clear()
                there.update(was)
        for items, old in lists:
            items[:] = old
        with torch.no_grad():
            for tensor, version, number in numbers:
                if tensor._version != version:
                    tensor.copy_(number)


def _writes_nothing(module: nn.Module) -> bool:
    return isinstance(module, GraphModule) and not any(map(is_inplace, module.graph.nodes))


def _written(held: Any) -> bool:
    """Whether a forward may write into it, and that can be seen."""
    if not isinstance(held, Tensor) or isinstance(held, (Lazy, nn.Parameter)):
        return False
    return not held.is_meta and not held.is_inference()
