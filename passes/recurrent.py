"""Recurrent layers: LSTM, GRU and plain RNN, whole or one step at a time (cells).

    w_ih (gates h) i, w_hh (gates h) k, b_ih, b_hh (gates h):  i is summed, k is summed, h = k

The hidden axis h is one unit per position: its row in every gate, its column of w_hh, and its
place in the state and in the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .values import Arrays, Operand, Site, Value, along
from .visit import Visit

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


def recurrent(visit: Visit) -> list[Arrays]:
    """Labels of the output [T, B, h * directions] and of the final states."""
    gates = GATES[visit.name]
    params, nodes = visit.given["params"], visit.bound["params"]
    biases, both = visit.given["has_biases"], visit.given["bidirectional"]
    states = visit.given["hx"]
    states = list(states) if isinstance(states, (list, tuple)) else [states]
    per_cell = 4 if biases else 2
    directions = 2 if both else 1
    layers = visit.given["num_layers"]
    if len(params) != per_cell * directions * layers:  # projections of an LSTM
        for value in visit.values():
            visit.freeze(list(value.arrays.values()), f"{visit.name} with projections")
        return visit.all_fixed(f"{visit.name} with projections")
    x = visit.given["input"]
    feature = len(x.shape) - 1
    incoming, source = x.arrays.get(feature), visit.bound["input"]
    for state in states:
        visit.freeze([a for d, a in state.arrays.items() if d != len(state.shape) - 1], "a state")
    previous = torch.zeros(0, dtype=torch.long)
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            at = (layer * directions + direction) * per_cell
            hidden = _cell(visit, params[at : at + per_cell], nodes[at : at + per_cell], gates)
            outputs.append(hidden)
            if layer == 0 and incoming is not None:
                _consume(visit, source, feature, incoming, params[at], nodes[at])
            elif layer:
                columns = params[at].arrays[1].reshape(-1)
                visit.labels.unite(previous, columns)
                sides = (Operand(nodes[at], 1, columns, False),)
                visit.labels.sites.append(Site(visit.node, sides))
        previous = torch.cat(outputs)
        for state in states:
            _tie_state(visit, state, outputs)
    for other in outputs[1:]:  # both directions lose the same places
        visit.labels.unite(outputs[0], other)
    return _results(visit, previous, x)


def _cell(visit: Visit, params: list[Value], nodes: list[Any], gates: int) -> Tensor:
    """Unite the gates' rows, the biases and the recurrent columns; the labels [h] of the state."""
    columns = params[1].arrays.get(1)
    size = params[1].shape[1]
    rows = [p.arrays[0].reshape(gates, size) for p in params if 0 in p.arrays]
    first = rows[0][0]
    for block in rows:
        visit.labels.unite(first.reshape(1, -1), block)
    if columns is not None:
        visit.labels.unite(first, columns.reshape(-1))
        sides = (Operand(nodes[1], 1, columns.reshape(-1), False),)
        visit.labels.sites.append(Site(visit.node, sides))
    visit.labels.mark("bent", [first], visit.name)
    return first


def _consume(
    visit: Visit, source: Any, dim: int, incoming: Tensor, weight: Value, node: Any
) -> None:
    flat = visit.labels.alone(incoming, dim)
    columns = weight.arrays[1]
    visit.labels.unite(flat.reshape(-1), columns.reshape(-1))
    if not visit.labels.is_fixed(incoming):
        sides = (Operand(source, dim, flat, True), Operand(node, 1, columns, False))
        visit.labels.sites.append(Site(visit.node, sides))


def _tie_state(visit: Visit, state: Value, outputs: list[Tensor]) -> None:
    """The state tensor [layers * directions, B, h] has one h for all: they lose equally many and
    at the same places.
    """
    array = state.arrays.get(len(state.shape) - 1)
    for hidden in outputs:
        if array is not None:
            visit.labels.unite(array.reshape(-1) if array.numel() > 1 else array, hidden)


def _results(visit: Visit, last: Tensor, x: Value) -> list[Arrays]:
    results = visit.all_fixed(f"an axis of {visit.name}")
    rank = len(x.shape)
    results[0][rank - 1] = along(last, rank - 1, rank)
    for arrays, out in zip(results[1:], visit.outs[1:], strict=True):
        hidden = last[: out.shape[-1]]
        arrays[out.dim() - 1] = along(hidden, out.dim() - 1, out.dim())
    return results


def one_step(visit: Visit) -> list[Arrays]:
    """A cell: the state it takes and the state it gives lose the same places."""
    names = [n for n in ("w_ih", "w_hh", "b_ih", "b_hh") if isinstance(visit.given[n], Value)]
    params, nodes = [visit.given[n] for n in names], [visit.bound[n] for n in names]
    hidden = _cell(visit, params, nodes, CELLS[visit.name])
    x = visit.given["input"]
    feature = len(x.shape) - 1
    if feature in x.arrays:
        _consume(visit, visit.bound["input"], feature, x.arrays[feature], params[0], nodes[0])
    states = visit.given["hx"]
    for state in states if isinstance(states, (list, tuple)) else [states]:
        last = len(state.shape) - 1
        visit.freeze([a for d, a in state.arrays.items() if d != last], "a state")
        if last in state.arrays:
            array = visit.labels.alone(state.arrays[last], last)
            visit.labels.unite(array.reshape(-1), hidden)
    results = visit.all_fixed(f"an axis of {visit.name}")
    for arrays, out in zip(results, visit.outs, strict=True):
        arrays[out.dim() - 1] = along(hidden, out.dim() - 1, out.dim())
    return results


CELLS = {"lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}
HANDLERS: dict[str, Callable[[Visit], list[Arrays]]] = {
    **dict.fromkeys(GATES, recurrent),
    **dict.fromkeys(CELLS, one_step),
}
