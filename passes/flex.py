"""flex: flex_attention taken apart into ops that the analysis knows.

    flex_attention(q, k, v, score_mod, mask_mod, scale)
    ->  softmax(where(mask_mod(b, h, i, j), score_mod(scale q k^T, b, h, i, j), -inf)) v

The mods are written for one score, at batch b, head h, query i and key j; here they run on all at
once, with b [B,1,1,1], h [H,1,1], i [M,1] and j [N]. Where score_mod changes nothing the call is
scaled_dot_product_attention. What a block mask leaves out is computed and masked: a user's own
class keeps its call. The op stays as it is where a mod does more than that element by element, or
where the largest score is asked for.
"""

from __future__ import annotations

import math
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from .pointwise import is_pointwise
from .visit import op_name
from .vmapped import trace_again

FLEX = torch.ops.higher_order.flex_attention
FLAT, INDEX = torch.ops.higher_order.flat_apply, torch.ops.aten.index.Tensor
"""How a traced mod reads buffer[index, ...]: the first with ModIndex among its arguments."""
MADE = {"new_ones", "new_zeros", "new_full", "ones", "zeros", "full", "scalar_tensor"}


def open_flex(module: GraphModule) -> GraphModule:
    """`module` without flex_attention where the mods allow it (in place)."""
    for node in module.graph.find_nodes(op="call_function", target=FLEX):
        for unused in [user for user in node.users if not user.users]:
            module.graph.erase_node(unused)
        results = [user for user in node.users if user.target is operator.getitem]
        given, returned = _ends(operator.attrgetter(str(node.args[3].target))(module))
        wanted = {user.args[1] for user in results}
        same = given is returned and wanted == {0}
        try:
            if wanted <= {0, 1}:
                trace_again(module, [node, *results], calls={FLEX: _scaled if same else _modified})
        except _Beyond:
            continue
    return module


class _Beyond(Exception):
    """A mod is more than element by element."""


def _scaled(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor]:
    _, blocks, scale, _, *held = rest
    mask = _mask(query, key, blocks[-1], held[1] if len(held) > 1 else ())
    grouped = query.shape[1] != key.shape[1]
    given = {"attn_mask": mask, "scale": scale, "enable_gqa": grouped}
    return (F.scaled_dot_product_attention(query, key, value, **given),)


def _modified(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: GraphModule,
    blocks: Any,
    scale: float,
    options: Any,
    score_held: Any = (),
    mask_held: Any = (),
) -> tuple[Tensor, Tensor]:
    """The results and the logarithm (to 2) of the sum of exponentials."""
    key, value = (_for_each(held, query.shape[1]) for held in (key, value))
    precise = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(precise) @ key.to(precise).transpose(-2, -1) * scale
    places = _places(query, key)
    scores = _Mod(score, places, len(places) + 1).run(scores, *places, *score_held).to(precise)
    mask = _mask(query, key, blocks[-1], mask_held)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        scores = scores.masked_fill(~mask, -math.inf)
        weights = scores.softmax(-1).masked_fill(~mask.any(-1, keepdim=True), 0)  # of none: 0
    return weights.to(query.dtype) @ value.to(query.dtype), scores.logsumexp(-1) / math.log(2)


def _for_each(held: Tensor, heads: int) -> Tensor:
    """Keys or values [B, G, N, d] for all heads of the queries, [B, H, N, d]."""
    batch, groups, length, size = held.shape
    if groups == heads:
        return held
    wide = held[:, :, None].expand(batch, groups, heads // groups, length, size)
    return wide.reshape(batch, heads, length, size)


def _places(query: Tensor, key: Tensor) -> list[Tensor]:
    """b, h, i, j in shapes that broadcast to the scores'."""
    sizes = (*query.shape[:3], key.shape[2])
    return [
        torch.arange(size, dtype=torch.int32, device=query.device)[(..., *[None] * (3 - dim))]
        for dim, size in enumerate(sizes)
    ]


def _mask(query: Tensor, key: Tensor, mod: GraphModule, held: Any) -> Tensor | None:
    """Which scores count, in a shape that broadcasts to [B, H, M, N]; None: the mod takes all."""
    if op_name(_ends(mod)[1]) == "new_ones":
        return None
    places = _places(query, key)
    mask: Tensor = _Mod(mod, places, len(places)).run(*places, *held)
    return mask.expand(*mask.shape[:-2], query.shape[2], key.shape[2])


def _ends(mod: GraphModule) -> tuple[Node, Node]:
    """The first placeholder and the result of a mod."""
    given, *_ = mod.graph.find_nodes(op="placeholder")
    (output,) = mod.graph.find_nodes(op="output")
    result = output.args[0]
    return given, result[0] if isinstance(result, (tuple, list)) else result


class _Partial(NamedTuple):
    """buffer[index, ...] of which dims are left."""

    buffer: Tensor
    indices: list[Tensor]


class _Mod(Interpreter):
    """Runs a mod on all scores at once; _Beyond where that is not the same. The first `count`
    arguments stand for a number each, whatever their shape.
    """

    def __init__(self, mod: GraphModule, places: list[Tensor], count: int) -> None:
        super().__init__(mod)
        self.places = places
        self.numbers = set(mod.graph.find_nodes(op="placeholder")[:count])

    def run_node(self, n: Node) -> Any:
        """The value of a node; for a tensor of which some dims are indexed a _Partial."""
        if n.target in (FLAT, INDEX):
            return self._read(n)
        if n.op == "call_function" and not self.numbers.isdisjoint(n.all_input_nodes):
            single = all(_rank(node) == 0 for node in (n, *n.all_input_nodes))
            if not single or not (is_pointwise(n) or op_name(n) in MADE):
                raise _Beyond
            self.numbers.add(n)
        return super().run_node(n)

    def _read(self, n: Node) -> Any:
        if n.target is FLAT:
            words = [word for word in n.args if not isinstance(word, Node)]
            buffer, *at = [a for a in n.args if isinstance(a, Node) and a.op != "get_attr"]
            known = len(words) == 1 and str(words[0]).endswith("ModIndex")
        else:
            buffer, at = n.args  # type: ignore[assignment]
            known = True
        if not known or not all(isinstance(a, Node) and _rank(a) == 0 for a in at):
            raise _Beyond
        held, indices = self.env[buffer], [self.env[a] for a in at]
        if isinstance(held, _Partial):
            held, indices = held.buffer, [*held.indices, *indices]
        elif buffer in self.numbers:
            raise _Beyond
        self.numbers.add(n)
        whole = len(indices) == held.dim()
        return self._taken(held, indices) if whole else _Partial(held, indices)

    def _taken(self, buffer: Tensor, indices: list[Tensor]) -> Tensor:
        """buffer[indices]; a dim that a place of its own indexes is moved there instead."""
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        rank, places = len(self.places), [[p is index for p in self.places] for index in indices]
        free = [index for index, kind in zip(indices, places, strict=True) if not any(kind)]
        spread = torch.broadcast_shapes((1,) * rank, *(index.shape for index in free))
        moved: dict[int, int] = {}  # axis of the scores -> dim of the buffer
        for dim, kind in enumerate(places):
            if any(kind) and kind.index(True) not in moved and spread[kind.index(True)] == 1:
                moved[kind.index(True)] = dim
        looked = [dim for dim in range(len(indices)) if dim not in moved.values()]
        for axis, dim in moved.items():
            if not statically_known_true(buffer.shape[dim] == self.places[axis].shape[0]):
                buffer = buffer.narrow(dim, 0, self.places[axis].shape[0])
        sizes = [buffer.shape[moved[a]] if a in moved else spread[a] for a in range(rank)]
        buffer = buffer.permute(*looked, *moved.values())
        if looked:
            buffer = buffer[tuple(indices[dim] for dim in looked)]
        buffer = buffer.reshape(*spread, *(sizes[axis] for axis in moved))
        order = [rank + list(moved).index(a) if a in moved else a for a in range(rank)]
        return buffer.permute(*order, *moved).reshape(sizes)


def _rank(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None
