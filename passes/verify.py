"""verify: the compact graph must equal the dense graph with the removed labels zeroed where they
are summed away.

    max |compact(x) - masked(x)| <= tolerance * max(1, max |masked(x)|)     on fresh inputs, in
    float64 where it fits, else in float32

The law is S_K x, S_K w -> op(1_K x, w) of passes/rules; it holds for chain, bilinear and head
groups. A mismatch is an
internal error; it names the first node that diverges.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from .capture import Args
from .choices import CHOICES
from .compare import outputs
from .errors import REPORT, VerificationError, where
from .fresh import WAYS, doubled, fresh_inputs, in_float64
from .held import held_inputs
from .lazy import Lazy, replace
from .precision import HALF, state_dtypes, widened, widened_inputs
from .removal import Removal, is_constant, sliced
from .rewrite import masked
from .rules import CUSTOM
from .visit import op_name

ROUNDS = 3  # a unit that one input leaves silent (ReLU) shows in another; the last is longer
DENSE = "masked dense"
_FULL = "can't allocate memory"  # of torch's allocator for the CPU
DECIMALS = 10  # of scores: below the tolerance, above the errors of float64
FLOAT64_LIMIT = 2**28  # parameters; above, float32 is used, weight by weight (passes/precision.py)


def verify(
    module: GraphModule, compact: GraphModule, cut: Removal, inputs: Args, seed: int = 0
) -> float:
    """Largest relative difference on fresh inputs; VerificationError if it exceeds the
    tolerance.
    """
    size = sum(p.numel() for p in module.parameters())
    precise = size <= FLOAT64_LIMIT and not any(map(_sees_bits, module.graph.nodes))
    reference = masked(module, cut)
    if precise:
        reference, compact = as_float64(reference), as_float64(copy.deepcopy(compact))
        _round_scores(reference)
        _round_scores(compact)
    else:
        reference, compact = widened(reference), widened(compact)
    worst = 0.0
    with torch.no_grad(), _default_dtype(torch.float64 if precise else torch.get_default_dtype()):
        for number in range(ROUNDS):
            longer = number == ROUNDS - 1
            try:
                given = doubled(inputs) if longer else inputs
                found = _round(reference, compact, cut, given, seed + number, precise)
            except VerificationError as error:
                if not longer or not error.unable:
                    raise
                found = _round(reference, compact, cut, inputs, seed + number, precise)
            worst = max(worst, found)
    return worst


def _sees_bits(node: Node) -> bool:
    """Whether the op reads numbers as another type of the same bits."""
    return node.target is torch.ops.aten.view.dtype


def _round(
    reference: GraphModule,
    compact: GraphModule,
    cut: Removal,
    inputs: Args,
    seed: int,
    precise: bool,
) -> float:
    args, expected = _expected(reference, inputs, seed, precise)
    return _compare(reference, compact, cut, args, expected, precise)


def _expected(
    reference: GraphModule, inputs: Args, seed: int, precise: bool
) -> tuple[Args, list[Tensor]]:
    """Fresh inputs, and what the reference makes of them: drawn anew; where it makes nothing of
    those (a logarithm, categories, spans), the example's own in another order, its rows in another
    order, the example.
    """
    held = held_inputs(reference)
    for way in WAYS:
        args = widened_inputs(fresh_inputs(inputs, seed, precise, way, held))
        try:
            expected = _run(reference, args, DENSE)
        except VerificationError as error:
            if way == WAYS[-1] or not error.unable:
                raise
            continue
        numbers = any(tensor.numel() for tensor in expected)
        if numbers and not any(bool(tensor.isnan().any()) for tensor in expected):
            break
    return args, expected


def _compare(
    reference: GraphModule,
    compact: GraphModule,
    cut: Removal,
    args: Args,
    expected: list[Tensor],
    precise: bool,
) -> float:
    actual = _run(compact, args, "compact")
    _refuse_undefined(reference, expected, args)
    worst = max((difference(a, b) for a, b in zip(expected, actual, strict=True)), default=0.0)
    tolerance = 1e-9 if precise else 1e-4
    if not worst <= tolerance:
        blame = first_divergence(reference, compact, cut, args, tolerance)
        raise VerificationError(
            f"compact and masked dense model differ by {worst:.2e} (allowed {tolerance:.0e}); "
            f"{blame} · nothing was written · {fault(reference)}"
        )
    return worst


def fault(module: GraphModule) -> str:
    """Who is to look where a graph fails: whoever registered a rule that it used, else we."""
    used = dict.fromkeys(op_name(node) for node in module.graph.nodes)
    ops = ", ".join(op for op in used if op in CUSTOM)
    if not ops:
        return REPORT
    return (
        f"help: the rule that was registered for {ops} may be wrong; passes.rules.probe finds one "
        "by experiment, and without a rule the op freezes what it touches"
    )


def _refuse_undefined(reference: GraphModule, expected: list[Tensor], args: Args) -> None:
    """VerificationError where the dense model's own outputs leave nothing to compare with."""
    if not any(tensor.numel() for tensor in expected):
        raise VerificationError(
            "the model gives no numbers at these inputs, so nothing can be verified · help: give "
            "`inputs` with at least one row, and a model that returns tensors"
        )
    if any(bool(tensor.isnan().any()) for tensor in expected):
        raise VerificationError(
            f"the dense model itself gives NaN, first at {_first_nan(reference, args)} · nothing "
            "was written · help: check its weights, and that it takes numbers drawn from N(0, 1)"
        )


def _first_nan(module: GraphModule, args: Args) -> str:
    recorder = _Recorder(module)
    with torch.no_grad():
        recorder.run(*pytree.tree_leaves(args))
    for node in module.graph.nodes:
        value = recorder.record.get(node.name)
        if isinstance(value, Tensor) and bool(value.isnan().any()):
            return str(node.target) if node.op == "get_attr" else where(node)
    return "the output"


def _run(module: GraphModule, args: Args, name: str) -> list[Tensor]:
    try:
        return outputs(module, args)
    except Exception as error:
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or _FULL in str(error)
        way_out = "help: example inputs of fewer rows" if full else fault(module)
        refusal = VerificationError(
            f"the {name} graph does not run: {error} · nothing was written · {way_out}"
        )
        refusal.unable = full or name == DENSE
        raise refusal from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Numbers that the graph itself makes (arange, zeros) get this precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def difference(left: Tensor, right: Tensor) -> float:
    """max |left - right| / max(1, max |left|) over the finite places; infinite unless the others
    are the same infinities (a masked score is -inf, NaN is never equal).
    """
    if left.shape != right.shape:
        return float("inf")
    finite = torch.isfinite(left) & torch.isfinite(right)
    if not torch.equal(left[~finite], right[~finite]):
        return float("inf")
    left, right = left[finite].double(), right[finite].double()
    return float((left - right).abs().max() / left.abs().max().clamp_min(1)) if len(left) else 0.0


def as_float64(module: GraphModule) -> GraphModule:
    """Parameters, buffers, plain tensors and every floating-point dtype burned into the graph
    become float64, complex ones complex128 (in place).
    """
    real, pairs = (torch.float32, *HALF), (torch.complex64, torch.complex32)
    wide = dict.fromkeys(real, torch.float64) | dict.fromkeys(pairs, torch.complex128)
    state_dtypes(module, wide)
    replace(module, lambda _, held: held.double() if isinstance(held, Lazy) else None)
    for holder in module.modules():
        for name, held in vars(holder).items():
            if isinstance(held, Tensor):
                setattr(holder, name, in_float64(held))
    return module._apply(in_float64)


def _round_scores(module: GraphModule) -> None:
    """What a choice is made on is rounded (in place): places that tie but for rounding errors (rows
    of padding) are then chosen alike in both graphs.
    """
    choices = [node for node in module.graph.nodes if op_name(node) in CHOICES]
    for node in choices:
        scores = node.args[0] if node.args else None
        value = scores.meta.get("val") if isinstance(scores, Node) else None
        if isinstance(value, Tensor) and value.is_floating_point():
            with module.graph.inserting_before(node):
                rounded = module.graph.call_function(
                    torch.ops.aten.round.decimals, (scores,), {"decimals": DECIMALS}
                )
            node.replace_input_with(scores, rounded)
    if choices:
        module.recompile()


class _Recorder(Interpreter):
    """Keeps every node's value."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.record: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.record[n.name] = super().run_node(n)
        return self.record[n.name]


def first_divergence(
    reference: GraphModule, compact: GraphModule, cut: Removal, args: Args, tolerance: float
) -> str:
    """The first node whose compact value is not the dense one without the removed labels."""
    runs = []
    for module in (reference, compact):
        recorder = _Recorder(module)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                recorder.run(*pytree.tree_leaves(args))
        except Exception as error:
            return f"running node by node failed: {error}"
        runs.append(recorder.record)
    for node in cut.deps.labels.values:
        left, right = runs[0].get(node.name), runs[1].get(node.name)
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            continue
        if node.op != "call_function" or is_constant(cut.value(node.name)):
            continue
        if not left.is_floating_point():
            continue
        left = left if left.shape == right.shape else sliced(left, cut.cuts(node.name))
        if left.shape != right.shape or float((left - right).detach().abs().max()) > tolerance * 10:
            shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
            return f"first diverging {where(node)}: shapes {shapes}"
    return "no single node diverges"
