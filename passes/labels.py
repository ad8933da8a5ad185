"""Label propagation: run the captured graph on labels instead of numbers.

    movement   the same aten op is executed on the label arrays (passes/moves.py)
    places     join, pad, write at places (passes/places.py); by data: passes/indexing.py and
               passes/routing.py
    pointwise  labels that meet in one element, on the same dim, unite (passes/pointwise.py)
    rules      passes/rules: carried axes unite, summed axes unite and end in a Site, mixed and
               fixed axes are marked (passes/axes.py)
    otherwise  everything that the op touches is marked frozen, with the op and the user's line as
               the reason

Two runs look at a program. The first labels what is inside blocks (the channels of a head). The
second, `outer=True`, labels the blocks: where a dim splits, what is inside a block is united.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from . import moves, places, routing
from .axes import apply_rule
from .composed import SPECIAL
from .control import WHY
from .covered import check_covered
from .errors import user_line, where
from .fakes import as_fake, executed, real_like
from .free_axes import Args
from .functional import written
from .pointwise import draws, is_pointwise, meet_pointwise
from .rules import table
from .values import (
    BLOCKS,
    CLOSED,
    Arrays,
    Labels,
    Mark,
    OpenAxes,
    Operand,
    Site,
    Source,
    Value,
)
from .visit import Visit, bind, op_name

__all__ = ["Labels", "Mark", "Operand", "Site", "Source", "Value", "propagate"]

CREATION = {"new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor"}
SHAPELESS = {"sym_size", "sym_numel", "sym_stride", "item", "_local_scalar_dense"}


def propagate(
    module: GraphModule,
    inputs: Args,
    check: bool = False,
    outer: bool = False,
    open_axes: OpenAxes = CLOSED,
) -> Labels:
    """Run `module` on labels at the sizes of `inputs`. With `check`, every op is checked: no dim
    without a label, no label lost (UnsupportedOp names the node).
    """
    return _Propagation(module, inputs, check, outer, open_axes).run()


class _Propagation:
    def __init__(
        self, module: GraphModule, inputs: Args, check: bool, outer: bool, open_axes: OpenAxes
    ) -> None:
        self.module, self.check, self.outer = module, check, outer
        self.open_axes = open_axes
        self.inputs = pytree.tree_leaves(inputs)
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.rules = table()
        self.labels = Labels()
        self.seen: dict[int, Value] = {}
        self.written = written(module.graph)

    def run(self) -> Labels:
        given = iter(enumerate(self.inputs))
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.labels.values[node] = self._input(node, *next(given, (-1, None)))
            elif node.op == "get_attr":
                self.labels.values[node] = self._attribute(node)
            elif node.op == "call_function":
                self.labels.values[node] = self._call(node)
            elif node.op == "output":
                self._output(node)
        return self.labels

    # ---------------------------------------------------------------- leaves
    def _input(self, node: Node, position: int, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        reason = f"an axis of the input {node.name} · {where(node)}"
        arrays = self.labels.all_fixed(value.shape, reason)
        free = [d for d in self.open_axes.inputs.get(position, ()) if value.shape[d] > 1]
        return Value(as_fake(self.fakes, value), arrays | self._open(node, value.shape, free))

    def _open(self, node: Node, shape: Iterable[int], free: list[int]) -> Arrays:
        """Labels of axes that may shrink, as if a reshape had split one axis into them."""
        if not free:
            return {}
        sizes = [size if dim in free else 1 for dim, size in enumerate(shape)]
        fresh = self.labels.fresh("free", node.name, free[-1], math.prod(sizes)).view(sizes)
        home = free[0] if self.outer else free[-1]
        blocks = self.labels.fixed(f"{BLOCKS} · {where(node)}", len(sizes))
        found = dict.fromkeys(free, blocks)
        if self.outer and len(free) > 1:
            self.labels.mark("blocked", [fresh], "a block", node)
            for dim in free[1:]:
                fresh = self.labels.collapse(fresh, dim)
        return found | {home: fresh}

    def _attribute(self, node: Node) -> Any:
        tensor: Any = operator.attrgetter(str(node.target))(self.module)
        if not isinstance(tensor, Tensor):
            return tensor
        if node.meta.get("literal"):
            return Value(as_fake(self.fakes, tensor), {}, tensor.cpu())
        if not tensor.is_floating_point() and not tensor.is_complex():
            unknown = "an index table without numbers" * isinstance(tensor, FakeTensor)
            unknown = "a table that forward writes" if node.target in self.written else unknown
            if unknown:
                fixed = self.labels.all_fixed(
                    tensor.shape, f"{unknown}: {node.target} · {where(node)}"
                )
                return Value(as_fake(self.fakes, tensor), fixed)
            return Value(as_fake(self.fakes, tensor), {}, tensor.cpu())
        if id(tensor) not in self.seen:
            arrays = self.labels.arrays_for("parameter", str(node.target), tensor.shape)
            self.seen[id(tensor)] = Value(as_fake(self.fakes, tensor), arrays, weight=True)
            if tensor.is_complex() and isinstance(tensor, nn.Parameter):
                told = node if user_line(node) else next(iter(node.users), node)
                reason = f"the complex weight {node.target} · {where(told)}"
                self.labels.mark("frozen", arrays.values(), reason, node)
        return self.seen[id(tensor)]

    def _output(self, node: Node) -> None:
        for position, leaf in enumerate(pytree.tree_leaves(node.args)):
            value = self._value(leaf)
            if isinstance(value, Value):
                free = self.open_axes.outputs.get(position, ())
                arrays = [array for dim, array in value.arrays.items() if dim not in free]
                arrays += [value.domain] if value.domain is not None else []
                reason = f"reaches the model's output · {where(leaf)}"
                self.labels.mark("frozen", arrays, reason, node)

    # ---------------------------------------------------------------- calls
    def _value(self, item: Any) -> Any:
        """A node's value; every device is the CPU here (passes/fakes.py)."""
        if isinstance(item, torch.device):
            return torch.device("cpu")
        return self.labels.values[item] if isinstance(item, Node) else item

    def _call(self, node: Node) -> Any:
        args = pytree.tree_map(self._value, (node.args, node.kwargs), is_leaf=_is_node)
        values = [v for v in pytree.tree_leaves(args, is_leaf=_is_value) if isinstance(v, Value)]
        name = op_name(node)
        if node.target is operator.getitem:
            return args[0][0][args[0][1]]
        if not values and not isinstance(node.target, torch._ops.OpOverload):
            return node.target(*args[0], **args[1])  # type: ignore[operator]
        if all(v.const is not None for v in values) or name in CREATION:
            return self._constant(node, args)
        fake = executed(self.fakes, node, args)
        if not isinstance(fake, (Tensor, tuple, list)):
            return fake
        outs = (fake,) if isinstance(fake, Tensor) else tuple(fake)
        for arg in node.all_input_nodes:
            self._label_constant(arg)
        given = bind(
            node, *pytree.tree_map(self._value, (node.args, node.kwargs), is_leaf=_is_node)
        )
        visit = Visit(
            self.labels, node, bind(node, node.args, node.kwargs), given, outs, self.outer
        )
        found = self._visit(visit, values)
        weight = values[0].weight and (name in moves.MOVEMENT or name in moves.SELECTION)
        domains = routing.domains(visit)
        results = [
            Value(out, self._once(arrays), None, weight, domain) if isinstance(out, Tensor) else out
            for out, arrays, domain in zip(outs, found, domains, strict=True)
        ]
        if self.check:
            check_covered(node, results)
        self._note_write(node, results[0])
        return results[0] if isinstance(fake, Tensor) else results

    def _once(self, arrays: Arrays) -> Arrays:
        return {dim: self.labels.once(array) for dim, array in arrays.items()}

    def _visit(self, visit: Visit, values: list[Value]) -> list[Arrays]:
        name = visit.name.rstrip("_") if not visit.name.startswith("_") else visit.name
        routing.settle(visit)
        if _writes_a_view(visit.node):
            return self._frozen_write(visit)
        if name in moves.MOVEMENT and _movable(visit, values):
            return moves.move(visit)
        for handlers in SPECIAL:
            if name in handlers:
                return handlers[name](visit)
        if "conv" in name and (visit.given.get("groups") or 1) > 1:
            return places.grouped_convolution(visit)
        if name in self.rules:
            return apply_rule(visit, self.rules[name])
        if draws(visit.node):
            return visit.unknown(f"{visit.name} draws numbers one after the other")
        if is_pointwise(visit.node):
            return [meet_pointwise(visit, out) for out in visit.outs]
        why = visit.node.meta.get(WHY)
        return visit.unknown(f"no axis rule for {visit.node.target}" + (f": {why}" if why else ""))

    def _constant(self, node: Node, args: Any) -> Any:
        plain = pytree.tree_map(
            lambda v: (v.const if v.const is not None else v.fake) if _is_value(v) else v,
            args,
            is_leaf=_is_value,
        )
        if op_name(node) in CREATION:
            plain = (tuple(real_like(a) for a in plain[0]), plain[1])
        with torch.no_grad():
            result = node.target(*plain[0], **plain[1])  # type: ignore[operator]
        result = list(result) if isinstance(result, tuple) else result
        return pytree.tree_map(
            lambda t: Value(as_fake(self.fakes, t), {}, t) if isinstance(t, Tensor) else t, result
        )

    def _label_constant(self, node: Node) -> None:
        """A constant gets labels when it meets labelled data (so that it can be gathered)."""
        value = self.labels.values[node]
        if isinstance(value, Value) and value.const is not None and not value.arrays:
            arrays = self.labels.arrays_for("constant", node.name, value.shape)
            self.labels.values[node] = Value(value.fake, arrays, value.const)

    def _note_write(self, node: Node, result: Any) -> None:
        """A constant that data was written into is none any more."""
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and isinstance(node.args[0], Node):
            written = self.labels.values[node.args[0]]
            if isinstance(written, Value) and written.const is not None:
                self.labels.values[node.args[0]] = result

    def _frozen_write(self, visit: Visit) -> list[Arrays]:
        """Writing through a view changes what other nodes see: all that is involved stays."""
        what = f"{visit.name} writes through a view"
        node = visit.node
        while isinstance(node, Node) and node.op == "call_function":
            value = self.labels.values.get(node)
            if isinstance(value, Value):
                visit.freeze(list(value.arrays.values()), what)
                fixed = self.labels.all_fixed(value.shape, visit.reason(what))
                self.labels.values[node] = Value(value.fake, fixed)
            node = node.args[0]  # type: ignore[assignment]
        return visit.unknown(f"no axis rule for {visit.node.target}")


def _movable(visit: Visit, values: list[Value]) -> bool:
    if visit.given.get("dtype") is not None:
        return False  # a view of the bits
    if visit.name in moves.RESHAPES and math.prod(values[0].shape) != math.prod(visit.shape):
        return False  # numbers decide how many places there are
    if visit.name == "as_strided":
        return False  # strides count in memory
    if visit.node.target is torch.ops.aten.repeat_interleave.Tensor:
        return False  # places by data
    return visit.name in moves.LIKE or all(v.const is not None for v in values[1:])


def _writes_a_view(node: Node) -> bool:
    """An in-place op whose target is a moved part of another tensor."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or not isinstance(node.args[0], Node):
        return False
    return node.args[0].op == "call_function" and op_name(node.args[0]) in moves.MOVEMENT


def _is_node(item: Any) -> bool:
    return isinstance(item, Node)


def _is_value(item: Any) -> bool:
    return isinstance(item, Value)
