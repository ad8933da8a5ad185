"""vmapped: what was traced inside torch.vmap, traced again below it.

    increment; x = add_batch_dim(h); y = x * x.sum(); remove_batch_dim(y); decrement
    ->  y = h * h.sum(-1, keepdim)...

torch.export records the calls that open and close vmap; what stands between them has a dim less
than its values. The section is run once more under make_fx, which sees the ops with all dims.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .errors import REPORT, CaptureError

OPEN, CLOSE = "_vmap_increment_nesting", "_vmap_decrement_nesting"
LOADING = "lazy_load_decompositions"


def unbatch(module: GraphModule) -> GraphModule:
    """`module` without calls of vmap (in place)."""
    depth, section = 0, list[Node]()
    for node in list(module.graph.nodes):
        name = getattr(node.target, "__name__", "")
        if name == LOADING:
            module.graph.erase_node(node)
            continue
        depth += name == OPEN
        if depth:
            section.append(node)
        depth -= name == CLOSE
        if section and not depth:
            trace_again(module, section)
            section = []
    return module


def trace_again(
    module: GraphModule,
    section: list[Node],
    table: Any = None,
    calls: Mapping[Any, Callable[..., Any]] | None = None,
    apart: bool = False,
) -> None:
    """Nodes that follow each other as make_fx sees them (in place); `table`: op -> of which others
    it is made; `calls`: op -> a function to call in its place, whose composed ops stay whole unless
    they are wanted `apart` (what runs under vmap must be).
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    inside = set(section)
    outside = dict.fromkeys(a for n in section for a in n.all_input_nodes if a not in inside)
    values = {node: _value(module, node) for node in outside}
    traceable = (Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)
    given = [node for node, value in values.items() if isinstance(value, traceable)]
    results = [n for n in section if any(user not in inside for user in n.users)]

    def run(*traced: Any) -> list[Any]:
        known = {**values, **dict(zip(given, traced, strict=True))}
        for node in section:
            if node.op == "get_attr":
                known[node] = _value(module, node)
                continue
            args, kwargs = pytree.tree_map(
                lambda a: known[a] if isinstance(a, Node) else a,
                (node.args, dict(node.kwargs)),
                is_leaf=lambda a: isinstance(a, Node),
            )
            known[node] = (calls or {}).get(node.target, node.target)(*args, **kwargs)
        return [known[node] for node in results]

    fake = detect_fake_mode(list(values.values())) or nullcontext()
    with _levels_closed(), torch.no_grad(), fake:  # what is made of sizes is fake as well
        traced = make_fx(run, table, pre_dispatch=calls is not None and not apart)(
            *map(values.__getitem__, given)
        )
    if any(isinstance(leaf, torch.SymInt) for leaf in _arguments(traced)):
        raise CaptureError(f"sizes were lost in tracing {section[0].name} again · {REPORT}")
    _put_in(module, traced, section, given, results)


@contextmanager
def _levels_closed() -> Iterator[None]:
    """Levels of vmap that an error leaves open are closed: torch would refuse random numbers."""
    functorch = torch._C._functorch
    before = functorch.maybe_current_level()
    try:
        yield
    finally:
        while functorch.maybe_current_level() != before:
            functorch._vmap_decrement_nesting()


def _arguments(traced: GraphModule) -> list[Any]:
    return [leaf for n in traced.graph.nodes for leaf in pytree.tree_leaves((n.args, n.kwargs))]


def _value(module: GraphModule, node: Node) -> Any:
    if "val" in node.meta or node.op != "get_attr":
        return node.meta["val"]
    return operator.attrgetter(str(node.target))(module)


def _put_in(
    module: GraphModule,
    traced: GraphModule,
    section: list[Node],
    given: list[Node],
    results: list[Node],
) -> None:
    """The nodes of `traced` in place of `section`."""
    known: dict[Node, Any] = dict(
        zip(traced.graph.find_nodes(op="placeholder"), given, strict=True)
    )
    origin = {key: section[0].meta.get(key) for key in ("stack_trace", "nn_module_stack")}
    with module.graph.inserting_before(section[0]):
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                name = f"_traced_{section[0].name}_{node.target}"
                module.register_buffer(name, getattr(traced, str(node.target)), persistent=False)
                known[node] = module.graph.get_attr(name)
            elif node.op == "call_function":
                known[node] = module.graph.node_copy(node, known.__getitem__)
            else:
                continue
            known[node].meta = {**node.meta, **origin}
    (returned,) = next(n for n in traced.graph.nodes if n.op == "output").args
    for old, new in zip(results, returned, strict=True):
        old.replace_all_uses_with(known[new], delete_user_cb=lambda user: user not in section)
    for node in reversed(section):
        module.graph.erase_node(node)
