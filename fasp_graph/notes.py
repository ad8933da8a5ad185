"""notes: what the report says beside its figures."""

from __future__ import annotations

import re

from passes.bounds import bounds
from passes.branches import assumptions
from passes.capture import Captured
from passes.held import held_inputs
from passes.select import Plan

from .calibration import few_tokens, measuring, untold
from .config import Config
from .units import counted
from .walking import Decisions

_ALIKE = re.compile(r"\S+\.shape\[\d+\] == \S+\.shape\[\d+\]")  # two inputs of one batch


def notes(captured: Captured, plan: Plan, decisions: Decisions, config: Config) -> tuple[str, ...]:
    """What the user should know of: what the graph holds for alone, a budget that units are too
    large for, what was done otherwise than asked for, data that are few.
    """
    data = (*untold(decisions.untold), *few_tokens(decisions.seen, captured.inputs))
    own = _of_the_run(plan, decisions, config)
    return (*_of_the_graph(captured), *own, *decisions.notes, *data)


def _of_the_graph(captured: Captured) -> list[str]:
    found = []
    inputs = captured.graph_module.graph.find_nodes(op="placeholder")
    names = [inputs[k].name for k in sorted(held_inputs(captured.graph_module))]
    if names:
        found.append(
            f"the graph, and an ONNX file made of it, hold for {', '.join(names)} of the example "
            "inputs alone, since forward computes sizes from them; the model takes any"
        )
    sizes = [said for said in bounds(captured.graph_module) if not _ALIKE.fullmatch(said)]
    if sizes:
        found.append(
            f"the graph holds for {', '.join(sizes)} and refuses other sizes, where forward "
            "computes otherwise or not at all; what an ONNX file and the model do there was not "
            "verified"
        )
    if captured.branches:
        found.append(
            f"forward branches on numbers at {', '.join(captured.branches)}: the graph, and an "
            "ONNX file made of it, take one way for both, which changed no number in any run that "
            "was compared"
        )
    found += [
        f"{said}: it refuses the other, which an ONNX file and the model take unverified"
        for said in assumptions(captured.graph_module)
    ]
    return found


def _of_the_run(plan: Plan, decisions: Decisions, config: Config) -> list[str]:
    found = []
    reached = decisions.budget.sparsity if measuring(config) else plan.sparsity
    if reached < config.sparsity / 2:
        found.append(
            f"sparsity {reached:.3f} was reached of {config.sparsity:.3f}: one unit of a "
            "group more would have removed too much · help: ask for more, or leave out a kind of "
            "groups"
        )
    if decisions.distances and decisions.distances[-1] == 1:
        found.append(
            "no step of all layers brought the outputs nearer to the dense ones on calibration "
            "that it was not fitted to, so that none was taken · help: calibrate on more data, or "
            "leave them out by restore='affine'"
        )
    if decisions.cost.untimed:
        count, first = len(decisions.cost.untimed), decisions.cost.untimed[0]
        found.append(
            f"{counted(count, 'op')} of the layers in scope did not run by itself, and counts "
            f"nothing in the budget: {first} · help: budget='parameters' counts all weights"
        )
    return found
