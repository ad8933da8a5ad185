"""constants: a constant that meets data in several places gets a name of its own in each.

    s0 = q0 @ k0 + alibi; s1 = q1 @ k1 + alibi        as      ... + alias(alibi); ... + alias(alibi)

What meets in one tensor goes together; a table of constants (slopes per head, a mask) that all
layers share would tie their heads to each other, though each could gather its own part. An alias
costs nothing, and `rejoin` takes away those that nothing was gathered from.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .errors import CaptureError
from .visit import op_name

aten = torch.ops.aten
CREATION = {"new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor"}


def mark_literals(module: GraphModule) -> None:
    """Tensors of numbers that stand in the code of forward are constants, and no weights. Refuses
    generators: their state would run on from call to call.
    """
    for node in module.graph.find_nodes(op="get_attr"):
        held = operator.attrgetter(str(node.target))(module)
        if isinstance(held, torch.Generator):
            raise CaptureError(
                "forward draws from a generator of its own, whose state a graph would carry from "
                "call to call · help: draw the numbers once, and keep them as a buffer"
            )
        node.meta["literal"] = any(op_name(user) == "lift_fresh_copy" for user in node.users)


def separate(module: GraphModule) -> None:
    """Give each use of a shared constant by data its alias (in place)."""
    known: set[Node] = set()
    for node in module.graph.nodes:
        if _is_constant(module, node, known):
            known.add(node)
    for node in known:
        users = [user for user in node.users if user not in known and user.op == "call_function"]
        for user in users[1:]:
            with module.graph.inserting_before(user):
                own = module.graph.call_function(aten.alias.default, (node,))
            own.meta = dict(node.meta)
            user.replace_input_with(node, own)


def rejoin(module: GraphModule) -> None:
    """Remove aliases (in place)."""
    for node in list(module.graph.nodes):
        if node.target is aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _is_constant(module: GraphModule, node: Node, known: set[Node]) -> bool:
    """Whether a node's result is a tensor that depends on no input and on no weight."""
    if node.op == "get_attr":
        held = operator.attrgetter(str(node.target))(module)
        return isinstance(held, Tensor) and not (held.is_floating_point() or held.is_complex())
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return False
    if op_name(node) in CREATION:
        return True
    tensors = [a for a in node.all_input_nodes if not isinstance(a.meta.get("val"), (int, float))]
    sizes = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return all(a in known or isinstance(a.meta.get("val"), sizes) for a in tensors)
