"""One trial: prune a random program at random and compare with two independent references.

compact(x) = masked(x)        the graph in which removed labels are zero where summed away
compact(x) = eager(x)         the user's own module, with zeros in the consumers' weights
                              (unless the residual stream gets narrower)
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import torch
from programs import Case, build, sample
from torch import nn

from passes.analysis import analysis
from passes.capture import capture
from passes.errors import FaspGraphError, VerificationError
from passes.groups import DependencyGraph, Group
from passes.pieces import with_every_piece
from passes.removal import removal
from passes.rewrite import attribute, masked, rewrite
from passes.verify import verify

TOLERANCE = 1e-9  # float64; outputs are of order 1


class Mismatch(AssertionError):
    """The compact program computes other numbers, or an error does not say where."""


@dataclass(frozen=True)
class Outcome:
    """What a trial saw: how many groups were cut, of which kinds; a refusal's message."""

    cut: int
    kinds: tuple[str, ...]
    refusal: str = ""
    eager: bool = False


def trial(case: Case) -> Outcome:
    """Mismatch where something is wrong; refusals by a FaspGraphError that names a node are
    outcomes.
    """
    model = build(case.steps)
    captured = capture(model, sample(0))
    module = captured.graph_module
    deps = analysis(module, captured.inputs, check=True)
    kept = chosen(deps, random.Random(case.pruning))
    kinds = tuple(sorted({deps[name].kind for name in kept}))
    try:
        cut = removal(deps, kept)
        compact = rewrite(module, cut)
        verify(module, compact, cut, captured.inputs)
        reference = masked(module, cut)
    except VerificationError as error:
        raise Mismatch(f"{sorted(kept)}: {error}") from error
    except FaspGraphError as error:
        if "%" not in str(error):
            raise Mismatch(f"a refusal names no node: {error}") from error
        return Outcome(len(kept), kinds, str(error))
    inputs = sample(1)
    _equal(compact(inputs), reference(inputs), "masked", kept)
    eager = "width" not in kinds
    if eager:
        _equal(compact(inputs), zeroed(model, deps, kept)(inputs), "eager", kept)
    return Outcome(len(kept), kinds, "", eager)


def _equal(left: torch.Tensor, right: torch.Tensor, name: str, kept: dict[str, Any]) -> None:
    error = float((left - right).detach().abs().max() / max(1.0, float(right.abs().max())))
    if left.shape != right.shape or not error <= TOLERANCE:
        raise Mismatch(f"{sorted(kept)}: {error:.1e} away from the {name} model")


CHOICES = [("chain",), ("bilinear",), ("head",), ("width",), ("chain", "bilinear", "head", "width")]


def chosen(
    deps: DependencyGraph,
    draw: random.Random,
    kinds: tuple[str, ...] | None = None,
    share: float = 0.8,
) -> dict[str, list[int]]:
    """Random units of random groups of random kinds, equally many in each block."""
    kinds = kinds or draw.choice(CHOICES)
    able = [g for g in deps.groups if g.kind != "frozen" and _room(g) > 0]
    groups = [g for g in able if g.kind in kinds and draw.random() < share]
    return {group.name: _units(group, draw) for group in groups or able[:1]}


def _room(group: Group) -> int:
    """How many units of each block may go."""
    return group.size // group.blocks - max(1, -(-group.least // group.blocks))


def _units(group: Group, draw: random.Random) -> list[int]:
    count = group.size // group.blocks - draw.randint(1, _room(group))
    kept: list[int] = []
    for block in range(group.blocks):
        units = [u for u in range(group.size) if group.block_of[u] == block]
        kept += draw.sample(units, count)
    return list(with_every_piece(group, kept, [draw.random() for _ in range(group.size)]))


def zeroed(model: nn.Module, deps: DependencyGraph, kept: dict[str, list[int]]) -> nn.Module:
    """A copy of the user's module with zeros where its weights read a removed unit; where two
    activations read it (queries and keys) or a mean counts it, in the weights that make it.
    """
    dense = copy.deepcopy(model)
    for name, units in kept.items():
        group = deps[name]
        gone = [u for u in range(group.size) if u not in set(units)]
        read = {(consumer.parameter, consumer.dim) for consumer in group.consumers}
        for member in group.members:
            if group.means or ("", -1) in read or (member.parameter, member.dim) in read:
                places = torch.from_numpy(member.indices[gone].reshape(-1))
                with torch.no_grad():
                    attribute(dense, member.parameter).index_fill_(member.dim, places, 0.0)
    return dense
