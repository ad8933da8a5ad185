"""Label propagation: run the captured graph on labels instead of numbers.

Every index of every dim of every weight is an integer label. A Value carries, per dim, at most one
label array: an
int64 tensor that broadcasts to the value's shape (size 1 on every dim along which the label does
not change). The
dim is the one that pruning compacts; other dims along which the array varies enumerate blocks
(heads).

    movement   the same aten op is executed on the label arrays
    pointwise  labels that meet in one element, on the same dim, unite
    rules      passes/rules: carried axes unite, summed axes unite and end in a Site, mixed and
    fixed axes are marked
    otherwise  everything that the op touches is marked frozen, with the op and the user's line as
    the reason
"""

from __future__ import annotations

import bisect
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .capture import Args
from .errors import UnsupportedOp, where
from .rules import Call, parse, table

Arrays = Mapping[int, Tensor]
MOVEMENT = {
    "reshape",
    "view",
    "_unsafe_view",
    "view_as",
    "reshape_as",
    "flatten",
    "unflatten",
    "permute",
    "transpose",
    "t",
    "movedim",
    "swapaxes",
    "squeeze",
    "unsqueeze",
    "expand",
    "expand_as",
    "select",
    "slice",
    "narrow",
    "split",
    "split_with_sizes",
    "chunk",
    "unbind",
    "roll",
    "flip",
    "repeat",
    "tile",
    "repeat_interleave",
    "index_select",
    "index",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "unfold",
    "diagonal",
}
SAME_DIMS = {"slice", "narrow", "split", "split_with_sizes", "chunk", "flip", "roll"}
JOIN = {"cat", "concat", "stack"}
CARRY = {
    "clone",
    "contiguous",
    "to",
    "_to_copy",
    "dropout",
    "type_as",
    "detach",
    "alias",
    "tril",
    "triu",
    "masked_fill",
    "where",
    "clamp",
    "gelu",
    "silu",
    "relu",
    "hardtanh",
    "hardswish",
    "softplus",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
}
LINEAR = {"add", "sub", "neg", "rsub", "to", "_to_copy", "contiguous", "clone", "type_as"}


@dataclass(frozen=True)
class Source:
    """A run of labels: `size` indices of dim `dim` of `name`, from label `start` on."""

    kind: str  # parameter | input | constant | position
    name: str
    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class Operand:
    """One side of a summed axis: which argument of the node, which dim of it, its labels there."""

    node: Node
    dim: int
    labels: Tensor
    data: bool  # depends on the model's inputs


@dataclass(frozen=True)
class Site:
    """An axis summed away at a node."""

    node: Node
    operands: tuple[Operand, ...]


@dataclass(frozen=True)
class Mark:
    """Labels that an op has frozen, mixed or bent (a pointwise non-linearity)."""

    kind: str  # frozen | mixed | bent
    labels: Tensor
    reason: str


@dataclass(frozen=True)
class Value:
    """What is known of a node's result: its shape, label arrays, and its numbers if it
    depends on no input.
    """

    fake: Tensor
    arrays: Arrays = field(default_factory=dict)
    const: Tensor | None = None
    data: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The concrete shape."""
        return tuple(self.fake.shape)


@dataclass
class Labels:
    """The result of propagation: values by node, sources, and what was found on the way."""

    values: dict[Node, Any] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    count: int = 0
    edges: list[Tensor] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)

    def fresh(self, kind: str, name: str, dim: int, size: int) -> Tensor:
        """`size` new labels."""
        self.sources.append(Source(kind, name, dim, self.count, size))
        self.count += size
        return torch.arange(self.count - size, self.count)

    def arrays_for(self, kind: str, name: str, shape: Iterable[int]) -> dict[int, Tensor]:
        """New labels for every dim of size > 1."""
        shape = tuple(shape)
        return {
            dim: along(self.fresh(kind, name, dim, size), dim, len(shape))
            for dim, size in enumerate(shape)
            if size > 1
        }

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Labels that stand at the same place (after broadcasting) are one unit."""
        left, right = torch.broadcast_tensors(left, right)
        pairs = torch.stack([left.reshape(-1), right.reshape(-1)], 1)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        if len(pairs):
            self.edges.append(torch.unique(pairs, dim=0))

    def collapse(self, array: Tensor, dim: int) -> Tensor:
        """Unite along `dim` and drop it to size 1: what varied there goes together."""
        if array.shape[dim] > 1:
            self.unite(array.narrow(dim, 0, 1), array)
        return array.narrow(dim, 0, 1)

    def immovable(self, array: Tensor) -> bool:
        """Whether the array's labels were frozen from birth (inputs, positions)."""
        first = int(array.reshape(-1)[0])
        at = bisect.bisect_right(self.sources, first, key=lambda source: source.start) - 1
        return self.sources[at].kind in ("input", "position")

    def meet(self, arrays: list[Tensor]) -> Tensor:
        """Arrays that compact the same dim of one value unite; the frozen one, else the
        finest, stands for all.
        """
        for other in arrays[1:]:
            self.unite(arrays[0], other)
        return max(arrays, key=lambda array: (array.numel(), self.immovable(array)))

    def mark(self, kind: str, arrays: Iterable[Tensor], reason: str) -> None:
        """Mark the labels of `arrays`."""
        for array in arrays:
            self.marks.append(Mark(kind, torch.unique(array), reason))


def along(labels: Tensor, dim: int, rank: int) -> Tensor:
    """A vector of labels as an array of `rank` dims that varies along `dim`."""
    return labels.view([-1 if k == dim else 1 for k in range(rank)])


def compress(array: Tensor) -> Tensor:
    """Size 1 on every dim along which the labels do not change."""
    for dim, size in enumerate(array.shape):
        if size > 1 and array.numel() and bool((array == array.narrow(dim, 0, 1)).all()):
            array = array.narrow(dim, 0, 1)
    return array.contiguous()


def propagate(module: GraphModule, inputs: Args, check: bool = False) -> Labels:
    """Run `module` on labels at the sizes of `inputs`."""
    return _Propagation(module, inputs, check).run()


class _Propagation:
    def __init__(self, module: GraphModule, inputs: Args, check: bool) -> None:
        self.module = module
        self.inputs = pytree.tree_leaves(inputs)
        self.check = check
        self.fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.rules = table()
        self.labels = Labels()
        self.seen: dict[int, Value] = {}

    def run(self) -> Labels:
        given = iter(self.inputs)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.labels.values[node] = self._input(node, next(given, None))
            elif node.op == "get_attr":
                self.labels.values[node] = self._attribute(node)
            elif node.op == "call_function":
                self.labels.values[node] = self._call(node)
            elif node.op == "output":
                self._output(node)
        return self.labels

    # ---------------------------------------------------------------- leaves
    def _fake(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fakes.from_tensor(tensor)

    def _input(self, node: Node, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        arrays = self.labels.arrays_for("input", node.name, value.shape)
        self.labels.mark("frozen", arrays.values(), f"an axis of the input {node.name}")
        return Value(self._fake(value), arrays, None, True)

    def _attribute(self, node: Node) -> Any:
        tensor: Any = operator.attrgetter(str(node.target))(self.module)
        if not isinstance(tensor, Tensor):
            return tensor
        if not tensor.is_floating_point() and not tensor.is_complex():
            return Value(self._fake(tensor), {}, None if isinstance(tensor, FakeTensor) else tensor)
        if id(tensor) not in self.seen:
            name = str(node.target)
            self.labels.parameters[id(tensor)] = name
            arrays = self.labels.arrays_for("parameter", name, tensor.shape)
            self.seen[id(tensor)] = Value(self._fake(tensor), arrays)
        return self.seen[id(tensor)]

    def _output(self, node: Node) -> None:
        for value in pytree.tree_leaves(pytree.tree_map(self._value, node.args, is_leaf=_is_node)):
            if isinstance(value, Value):
                self.labels.mark("frozen", value.arrays.values(), "reaches the model's output")

    # ---------------------------------------------------------------- calls
    def _value(self, item: Any) -> Any:
        return self.labels.values[item] if isinstance(item, Node) else item

    def _call(self, node: Node) -> Any:
        args = pytree.tree_map(self._value, (node.args, node.kwargs), is_leaf=_is_node)
        flat = pytree.tree_leaves(args, is_leaf=_is_value)
        values = [v for v in flat if isinstance(v, Value)]
        if node.target is operator.getitem:
            return args[0][0][args[0][1]]
        if not values and not isinstance(node.target, torch._ops.OpOverload):
            return node.target(*args[0], **args[1])  # type: ignore[operator]
        if all(v.const is not None for v in values):
            return self._constant(node, args)
        fake = self._execute_fake(node, args)
        if not isinstance(fake, (Tensor, tuple, list)):
            return fake
        data = any(v.data for v in values)
        name = _op_name(node)
        if self._moves(name, values):
            arrays = self._move(node, args, values[0])
        elif name in JOIN:
            arrays = [self._join(node, args, fake)]
        elif name in ("constant_pad_nd", "pad"):
            arrays = [self._pad(node, args, fake)]
        elif "conv" in name and _bind(node, args).get("groups", 1) > 1:
            arrays = [self._grouped_convolution(node, args)]
        elif name in self.rules:
            arrays = self._rule(node, args, self.rules[name])
        elif _pointwise(node):
            arrays = [self._pointwise(node, name, flat, fake)]
        else:
            arrays = self._unknown(node, values, fake)
        return self._result(node, fake, arrays, data)

    def _moves(self, name: str, values: list[Value]) -> bool:
        return name in MOVEMENT and all(v.const is not None for v in values[1:])

    def _result(self, node: Node, fake: Any, arrays: list[Any], data: bool) -> Any:
        single = isinstance(fake, Tensor)
        outs = [fake] if single else list(fake)
        values = []
        for out, found in zip(outs, arrays, strict=True):
            value = Value(out, found, None, data)
            if self.check:
                check_covered(node, value)
            values.append(value)
        return values[0] if single else values

    def _constant(self, node: Node, args: Any) -> Any:
        plain = pytree.tree_map(
            lambda v: v.const if isinstance(v, Value) else v, args, is_leaf=_is_value
        )
        with torch.no_grad():
            result = node.target(*plain[0], **plain[1])  # type: ignore[operator]
        return pytree.tree_map(
            lambda t: Value(self._fake(t), {}, t) if isinstance(t, Tensor) else t, result
        )

    def _execute_fake(self, node: Node, args: Any) -> Any:
        plain = pytree.tree_map(
            lambda v: v.fake if isinstance(v, Value) else v, args, is_leaf=_is_value
        )
        try:
            with self.fakes, torch.no_grad():
                return node.target(*plain[0], **plain[1])  # type: ignore[operator]
        except Exception as error:
            raise UnsupportedOp(
                f"cannot infer the shape of {node.target}: {error} · {where(node)}"
            ) from error

    def _labelled(self, node: Node, value: Value) -> Value:
        """A constant gets labels when it meets labelled data (so that it can be gathered)."""
        if value.const is None or value.arrays or not value.shape:
            return value
        arrays = self.labels.arrays_for("constant", node.name, value.shape)
        labelled = Value(value.fake, arrays, value.const, value.data)
        self.labels.values[node] = labelled
        return labelled

    def _operands(self, node: Node) -> dict[Node, Value]:
        found = {}
        for arg in node.all_input_nodes:
            value = self.labels.values[arg]
            if isinstance(value, Value):
                found[arg] = self._labelled(arg, value)
        return found

    # ---------------------------------------------------------------- movement
    def _move(self, node: Node, args: Any, value: Value) -> list[Any]:
        def execute(array: Tensor) -> list[Tensor]:
            replaced = {id(value): array.expand(value.shape)}
            plain = pytree.tree_map(
                lambda v: replaced.get(id(v), v.const) if isinstance(v, Value) else v,
                args,
                is_leaf=_is_value,
            )
            result = node.target(*plain[0], **plain[1])  # type: ignore[operator]
            return [result] if isinstance(result, Tensor) else list(result)

        outputs: list[dict[int, list[Tensor]]] = []
        for dim, array in value.arrays.items():
            moved = [compress(out) for out in execute(array)]
            ticks = [
                compress(out)
                for out in execute(along(torch.arange(value.shape[dim]), dim, len(value.shape)))
            ]
            outputs = outputs or [{} for _ in moved]
            for slot, out, tick in zip(outputs, moved, ticks, strict=True):
                if not out.numel():
                    continue
                target = dim if _op_name(node) in SAME_DIMS else _home(out, tick)
                if (
                    target is not None
                    and self.labels.immovable(array)
                    and sum(n > 1 for n in out.shape) > 1
                ):
                    for d, size in enumerate(out.shape):
                        if size > 1:
                            slot.setdefault(d, []).append(self._position(node, d, size, out.dim()))
                elif target is not None:
                    slot.setdefault(target, []).append(out)
        if not outputs:
            result = execute(torch.zeros([1] * len(value.shape), dtype=torch.long))
            return [{} for _ in result]
        return [
            {dim: self._merge(node, dim, candidates) for dim, candidates in slot.items()}
            for slot in outputs
        ]

    def _position(self, node: Node, dim: int, size: int, rank: int) -> Tensor:
        fresh = along(self.labels.fresh("position", node.name, dim, size), dim, rank)
        self.labels.mark("frozen", [fresh], "an axis of the input")
        return fresh

    def _merge(self, node: Node, dim: int, candidates: list[Tensor]) -> Tensor:
        """Several arrays want one dim (a flatten): the finer one that can be pruned covers it."""
        if len(candidates) == 1:
            return candidates[0]
        candidates.sort(
            key=lambda a: (not self.labels.immovable(a), len(torch.unique(a)), a.numel())
        )
        best = candidates.pop()
        if self.labels.immovable(best):
            size = max(a.shape[dim] for a in (best, *candidates))
            return self._position(node, dim, size, best.dim())
        for other in candidates:
            if self.labels.immovable(other):
                continue
            if other.shape == best.shape and len(torch.unique(other)) == len(torch.unique(best)):
                self.labels.unite(best, other)
            else:
                self.labels.mark(
                    "frozen", [other], f"an outer label at {_op_name(node)} · {where(node)}"
                )
        return best

    # ---------------------------------------------------------------- join, pad
    def _join(self, node: Node, args: Any, fake: Tensor) -> dict[int, Tensor]:
        bound = _bind(node, args)
        rank, dim = fake.dim(), bound.get("dim", 0) % fake.dim()
        self._operands(node)
        parts = [self.labels.values[n] for n in _bind(node, (node.args, node.kwargs))["tensors"]]
        stacked = _op_name(node) == "stack"
        shapes, arrays = [], []
        for part in parts:
            if not stacked and part.fake.numel() == 0 and part.fake.dim() == 1:
                continue
            shape, found = list(part.shape), dict(part.arrays)
            if stacked:
                shape.insert(dim, 1)
                found = {k + (k >= dim): a.unsqueeze(dim) for k, a in found.items()}
            if shape[dim] and dim not in found and not _covered(found, dim):
                found[dim] = along(
                    self.labels.fresh("position", node.name, dim, shape[dim]), dim, rank
                )
                self.labels.mark(
                    "frozen", [found[dim]], f"a place in {_op_name(node)} · {where(node)}"
                )
            shapes.append(shape)
            arrays.append(found)
        result: dict[int, Tensor] = {}
        for axis in range(rank):
            held = [a[axis] for a in arrays if axis in a]
            if not held:
                continue
            if axis == dim:
                result[axis] = self._join_along(node, dim, shapes, arrays, held)
                continue
            held = [
                self.labels.collapse(a, dim) if stacked is False and a.shape[dim] > 1 else a
                for a in held
            ]
            if stacked:
                held = list(torch.broadcast_tensors(*held))
            result[axis] = compress(self.labels.meet(held))
        return result

    def _join_along(
        self,
        node: Node,
        dim: int,
        shapes: list[list[int]],
        arrays: list[dict[int, Tensor]],
        held: list[Tensor],
    ) -> Tensor:
        outer = [max(a.shape[k] for a in held) if k != dim else 1 for k in range(len(shapes[0]))]
        pieces = []
        for shape, found in zip(shapes, arrays, strict=True):
            if not shape[dim]:
                continue
            if dim not in found:
                found[dim] = along(
                    self.labels.fresh("position", node.name, dim, shape[dim]), dim, len(shape)
                )
                self.labels.mark(
                    "frozen", [found[dim]], f"a place in {_op_name(node)} · {where(node)}"
                )
            pieces.append(
                found[dim].expand([shape[dim] if k == dim else outer[k] for k in range(len(shape))])
            )
        return compress(torch.cat(pieces, dim))

    def _pad(self, node: Node, args: Any, fake: Tensor) -> dict[int, Tensor]:
        bound = _bind(node, args)
        (value,) = self._operands(node).values()
        pads, rank, result = list(bound["pad"]), fake.dim(), dict(value.arrays)
        zero = bound.get("mode", "constant") == "constant"
        for k in range(len(pads) // 2):
            dim, (left, right) = rank - 1 - k, pads[2 * k : 2 * k + 2]
            if not left and not right:
                continue
            for other, array in list(result.items()):
                if other != dim:
                    result[other] = self.labels.collapse(array, dim)
            inner = result.get(dim)
            if (
                inner is None
                or left < 0
                or right < 0
                or not zero
                or inner.numel() != inner.shape[dim]
            ):
                if inner is not None:
                    self.labels.mark(
                        "frozen", [inner], f"padded by {_op_name(node)} · {where(node)}"
                    )
                fresh = along(
                    self.labels.fresh("position", node.name, dim, fake.shape[dim]), dim, rank
                )
                self.labels.mark("frozen", [fresh], f"padded by {_op_name(node)} · {where(node)}")
                result[dim] = fresh
                continue
            ends = [
                along(self.labels.fresh("constant", node.name, dim, n), dim, rank)
                for n in (left, right)
            ]
            result[dim] = torch.cat([ends[0], inner, ends[1]], dim)
        return result

    # ---------------------------------------------------------------- pointwise
    def _pointwise(self, node: Node, name: str, flat: list[Any], fake: Tensor) -> dict[int, Tensor]:
        values = list(self._operands(node).values())
        rank, result = fake.dim(), {}
        for dim in range(rank):
            held = [
                a.reshape([1] * (rank - len(v.shape)) + list(a.shape))
                for v in values
                if (a := v.arrays.get(dim - rank + len(v.shape))) is not None
            ]
            if held:
                result[dim] = self.labels.meet(held)
        if name.rstrip("_") not in LINEAR and not (
            name.rstrip("_") in ("mul", "div") and len(values) == 1
        ):
            self.labels.mark("bent", result.values(), name)
        return result

    def _unknown(self, node: Node, values: list[Value], fake: Any) -> list[Any]:
        reason = f"no axis rule for {node.target} · {where(node)}"
        for value in self._operands(node).values():
            self.labels.mark("frozen", value.arrays.values(), reason)
        results = []
        for out in pytree.tree_leaves(fake):
            arrays = self.labels.arrays_for("position", node.name, out.shape)
            self.labels.mark("frozen", arrays.values(), reason)
            results.append(arrays)
        return results

    # ---------------------------------------------------------------- rules
    def _rule(self, node: Node, args: Any, rule: Any) -> list[dict[int, Tensor]]:
        nodes = _bind(node, (node.args, node.kwargs))
        self._operands(node)
        shaped = {k: (v.shape if isinstance(v, Value) else v) for k, v in _bind(node, args).items()}
        if "tensors" in nodes and isinstance(nodes["tensors"], (list, tuple)):
            operands = list(nodes["tensors"])
        else:
            operands = [v for k, v in nodes.items() if _tensor_argument(node, k)]
        axes = parse(rule if isinstance(rule, str) else rule(Call(shaped)))
        operands = operands[: len(axes.operands)]
        return _apply(self.labels, node, axes, operands)

    def _grouped_convolution(self, node: Node, args: Any) -> dict[int, Tensor]:
        """Depthwise: carry. Otherwise index j of every group goes together, and so do outputs."""
        bound = _bind(node, (node.args, node.kwargs))
        groups = bound["groups"]
        values = self._operands(node)
        x, w = values[bound["input"]], values[bound["weight"]]
        channel = len(x.shape) - (len(w.shape) - 1)
        arrays = dict(x.arrays)
        fixed = [arrays.pop(d) for d in list(arrays) if d > channel]
        fixed += [a for d, a in w.arrays.items() if d > 1]
        self.labels.mark("frozen", fixed, f"a position of {_op_name(node)}")
        inner = arrays.pop(channel, None)
        if inner is not None:
            for d in range(inner.dim()):
                inner = self.labels.collapse(inner, d) if d != channel else inner
        transposed = "transpose" in _op_name(node)
        if transposed and inner is not None:
            self.labels.mark("frozen", [inner, *w.arrays.values()], f"grouped {_op_name(node)}")
        per_in, outputs = w.shape[1], w.shape[0]
        out = w.arrays.get(0) if not transposed else None
        result = {d: a for d, a in arrays.items() if d < channel}
        if out is not None and inner is not None:
            lanes = inner.reshape(groups, per_in)
            out = out.reshape(groups, outputs // groups)
            if per_in == 1:
                self.labels.unite(lanes, out)
                self.labels.mark("bent", [out], "depthwise convolution")
            else:
                row = w.arrays[1].reshape(1, per_in)
                self.labels.unite(lanes, row)
                self.labels.unite(out[:1], out)
                sides = ((bound["input"], channel, lanes, True), (bound["weight"], 1, row, False))
                self.labels.sites.append(Site(node, tuple(Operand(*side) for side in sides)))
            result[channel] = along(out.reshape(-1), channel, len(x.shape))
            bias = bound.get("bias")
            if bias is not None:
                self.labels.unite(values[bias].arrays[0], out.reshape(-1))
        shape = node.meta["val"].shape if "val" in node.meta else x.shape
        for d in range(channel + 1, len(x.shape)):
            if shape[d] != 1:
                size = self._execute_fake(node, args).shape[d]
                result[d] = along(
                    self.labels.fresh("position", node.name, d, size), d, len(x.shape)
                )
                self.labels.mark("frozen", [result[d]], f"a position of {_op_name(node)}")
        return result


def _apply(labels: Labels, node: Node, axes: Any, operands: list[Any]) -> list[dict[int, Tensor]]:
    """Carried axes unite, summed axes unite and make a Site, the others are marked."""
    values = [labels.values[n] if isinstance(n, Node) else None for n in operands]
    lists = [
        _expand(names, len(v.shape)) if v is not None else ()
        for names, v in zip(axes.operands, values, strict=False)
    ]
    order = list(dict.fromkeys(name for names in lists for name in names))
    kinds = dict(axes.kinds)
    outputs = [_expand_out(names, order) for names in axes.outputs]
    carried = {name for names in outputs for name in names}
    merged: dict[str, Tensor] = {}
    for axis in order:
        sides = []
        for n, v, names in zip(operands, values, lists, strict=False):
            if v is None or axis not in names:
                continue
            dim = names.index(axis)
            if dim in v.arrays:
                sides.append(Operand(n, dim, _canonical(v.arrays[dim], names, order), v.data))
        if not sides:
            continue
        merged[axis] = labels.meet([side.labels for side in sides])
        kind = kinds.get(axis, "carry" if axis in carried else "sum")
        if kind == "sum":
            labels.sites.append(Site(node, tuple(sides)))
        elif kind in ("mixed", "fixed"):
            mark = "mixed" if kind == "mixed" else "frozen"
            labels.mark(mark, [merged[axis]], f"{kind} by {_op_name(node)} · {where(node)}")
        if axis in carried and _op_name(node) in ("batch_norm", "instance_norm"):
            labels.mark("bent", [merged[axis]], "a scale per channel")
    results = []
    for names in outputs:
        found = {}
        for dim, axis in enumerate(names):
            if axis in merged:
                found[dim] = _restrict(labels, merged[axis], order, names)
            elif axis not in order and axis != "1":
                shape = _output_shape(labels, node)
                size = shape[dim] if shape else 0
                if size > 1:
                    found[dim] = along(
                        labels.fresh("position", node.name, dim, size), dim, len(names)
                    )
                    labels.mark("frozen", [found[dim]], f"a position of {_op_name(node)}")
        results.append(found)
    return results


def _output_shape(labels: Labels, node: Node) -> tuple[int, ...]:
    """Concrete output shape of a pooling or convolution, by running it on meta tensors."""
    args = pytree.tree_map(
        lambda n: labels.values[n] if isinstance(n, Node) else n,
        (node.args, node.kwargs),
        is_leaf=_is_node,
    )
    plain = pytree.tree_map(
        lambda v: (
            torch.empty(v.shape, dtype=v.fake.dtype, device="meta") if isinstance(v, Value) else v
        ),
        args,
        is_leaf=_is_value,
    )
    result = node.target(*plain[0], **plain[1])  # type: ignore[operator]
    return tuple((result if isinstance(result, Tensor) else result[0]).shape)


def _expand(names: tuple[str, ...], rank: int) -> tuple[str, ...]:
    if "..." not in names:
        return names
    at = names.index("...")
    free = rank - len(names) + 1
    return (*names[:at], *(f".{free - k}" for k in range(free)), *names[at + 1 :])


def _expand_out(names: tuple[str, ...], order: list[str]) -> tuple[str, ...]:
    if "..." not in names:
        return names
    at = names.index("...")
    dots = sorted((name for name in order if name[0] == "."), key=lambda n: -int(n[1:]))
    return (*names[:at], *dots, *names[at + 1 :])


def _canonical(array: Tensor, names: tuple[str, ...], order: list[str]) -> Tensor:
    present = [name for name in order if name in names]
    array = array.permute([names.index(name) for name in present])
    index = tuple(slice(None) if name in names else None for name in order)
    return array[index]


def _restrict(labels: Labels, array: Tensor, order: list[str], names: tuple[str, ...]) -> Tensor:
    for dim, name in enumerate(order):
        if name not in names:
            array = labels.collapse(array, dim)
    present = [name for name in names if name in order]
    array = array.permute(
        [order.index(n) for n in present] + [k for k, n in enumerate(order) if n not in names]
    )
    array = array.reshape(array.shape[: len(present)])
    return array[tuple(slice(None) if name in order else None for name in names)]


def _home(array: Tensor, ticks: Tensor) -> int | None:
    """The dim that pruning compacts after a movement: the last one that still carries the old
    dim's positions.
    """
    varies = [d for d, size in enumerate(array.shape) if size > 1]
    both = [d for d in varies if ticks.shape[d] > 1]
    return both[-1] if both else varies[-1] if varies else None


def _covered(arrays: Arrays, dim: int) -> bool:
    return any(array.shape[dim] > 1 for array in arrays.values())


def check_covered(node: Node, value: Value) -> None:
    """Every dim of size > 1 of a labelled value varies in some array, or the value was
    expanded along it.
    """
    for dim, size in enumerate(value.shape):
        constant = value.fake.stride(dim) == 0
        if size > 1 and not constant and not _covered(value.arrays, dim):
            if _op_name(node) in MOVEMENT | {"expand", "repeat"} or not value.arrays:
                continue
            raise UnsupportedOp(f"axis {dim} of size {size} lost its labels · {where(node)}")


def _is_node(item: Any) -> bool:
    return isinstance(item, Node)


def _is_value(item: Any) -> bool:
    return isinstance(item, Value)


def _op_name(node: Node) -> str:
    return (
        str(node.target).split(".")[1]
        if isinstance(node.target, torch._ops.OpOverload)
        else str(node.target)
    )


def _pointwise(node: Node) -> bool:
    name = _op_name(node)
    tags = getattr(node.target, "tags", ())
    if torch.Tag.pointwise in tags or name in CARRY:
        return True
    packet = getattr(torch.ops.aten, name.rstrip("_"), None) if name.endswith("_") else None
    overload = getattr(packet, getattr(node.target, "_overloadname", ""), None)
    return overload is not None and torch.Tag.pointwise in overload.tags


def _bind(node: Node, args: Any) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    bound = {}
    for position, argument in enumerate(schema):
        if position < len(args[0]):
            bound[argument.name] = args[0][position]
        elif argument.name in args[1]:
            bound[argument.name] = args[1][argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def _tensor_argument(node: Node, name: str) -> bool:
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return any(a.name == name and "Tensor" in str(a.type) for a in schema)
