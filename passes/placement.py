"""placement: a walk on other devices than the one that the model is on.

    node -> device    the graph in as many runs as devices, of nearly equally many bytes of weights

Weights stay where they are, in memory or in a folder, and are copied to a node's device when it
runs; values follow. What a walk finds out goes back to where the model is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .rewrite import attribute

Places = Mapping[Node, torch.device]


def spread(module: GraphModule, devices: Sequence[torch.device]) -> Places:
    """The device of every call; none for no devices. A weight counts where it is read first."""
    if not devices:
        return {}
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    seen: set[str] = set()
    sizes = []
    for node in calls:
        names = {str(arg.target) for arg in node.all_input_nodes if arg.op == "get_attr"} - seen
        sizes.append(sum(_bytes(attribute(module, name)) for name in names))
        seen |= names
    whole, before, places = max(sum(sizes), 1), 0, {}
    for node, size in zip(calls, sizes, strict=True):
        middle = (before + size / 2) / whole
        places[node] = devices[min(int(middle * len(devices)), len(devices) - 1)]
        before += size
    return places


def _bytes(held: Any) -> int:
    return held.numel() * held.element_size() if isinstance(held, Tensor) else 0


def moved(value: Any, place: torch.device | None) -> Any:
    """A value on a device, with all tensors in it; None: where it is."""
    if place is None:
        return value
    return pytree.tree_map(lambda v: _moved(v, place) if isinstance(v, Tensor) else v, value)


def _moved(value: Tensor, place: torch.device) -> Tensor:
    """What an expanded tensor repeats goes once."""
    if value.device == place or all(value.stride()):
        return value.to(place)
    own = value[tuple(slice(1 if step == 0 else None) for step in value.stride())]
    return own.to(place).expand(value.shape)


def home(module: GraphModule, name: str) -> torch.device:
    """Where the tensor of that name is; of none of the module's, where its first parameter is."""
    try:
        held = attribute(module, name)
    except AttributeError:
        held = next(module.parameters(), None)
    return held.device if isinstance(held, Tensor) else torch.device("cpu")
