"""cover_type: one model type through the whole compiler; prints one JSON line.

    python -m benchmarks.cover_type TYPE

build -> capture -> analyse -> for each kind: prune half of every group -> verify. The row says how
far it came and, where it stopped, why.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from typing import Any

import torch

from passes.analysis import analysis
from passes.capture import Captured, capture
from passes.errors import UnsupportedOp
from passes.groups import DependencyGraph, Group
from passes.pieces import with_every_piece
from passes.rehearsal import rehearsed
from passes.removal import removal
from passes.rewrite import rewrite
from passes.verify import verify

from .build_type import build
from .layers import layers_with_chains

KINDS = ("chain", "bilinear", "head")


def half(group: Group) -> tuple[int, ...]:
    """A random half of every block, at least what must stay."""
    generator = torch.Generator().manual_seed(len(group.name))
    block = torch.tensor(group.block_of)
    kept: list[int] = []
    for number in range(group.blocks):
        units = torch.nonzero(block == number).reshape(-1)
        order = torch.randperm(len(units), generator=generator)
        count = max(1, len(units) // 2, -(-group.least // group.blocks))
        kept += units[order[:count]].tolist()
    return with_every_piece(group, kept, torch.rand(group.size, generator=generator).tolist())


def cover(model_type: str, dynamic: bool | None = None) -> dict[str, Any]:
    """The row of one type; seconds are those of the CPU. `dynamic`: see passes.capture."""
    row: dict[str, Any] = {"type": model_type, "stage": "build", "seconds": {}}
    try:
        _stages(model_type, row, dynamic)
    except Exception as error:
        row["reason"] = reason(error)
        row["error"] = type(error).__name__
    return row


def _stages(model_type: str, row: dict[str, Any], dynamic: bool | None) -> None:
    started = time.process_time()

    def done(stage: str, following: str) -> None:
        nonlocal started
        row["seconds"][stage] = round(time.process_time() - started, 2)
        started, row["stage"] = time.process_time(), following

    built = build(model_type)
    row["class"] = type(built.model).__name__
    row["inputs"] = {name: list(value.shape) for name, value in built.inputs.items()}
    row["parameters"] = sum(p.numel() for p in built.model.parameters())
    done("build", "capture")
    program = capture(built.model, built.inputs, dynamic)
    row["nodes"] = len(program.graph_module.graph.nodes)
    done("capture", "analyse")
    deps = _analysed(program, row)
    row["groups"] = {
        k: sum(g.kind == k for g in deps.groups) for k in {g.kind for g in deps.groups}
    }
    row["prunable"] = prunable_share(deps)
    layers = layers_with_chains(program.graph_module, deps)
    row["layers"], row["without"] = layers.counts, layers.without
    row["frozen"], row["width"] = held_by(deps, "frozen"), held_by(deps, "width")
    done("analyse", "verify")
    row["verified"] = {kind: _verified(program, deps, kind) for kind in KINDS}
    done("verify", "done")


def _analysed(program: Captured, row: dict[str, Any]) -> DependencyGraph:
    """The groups; where the engine's own check fails, the row says so and goes on unchecked."""
    module, inputs = program.graph_module, program.inputs
    try:
        deps = analysis(module, inputs, check=True)
    except UnsupportedOp as error:
        row["unchecked"] = reason(error)
        deps = analysis(module, inputs, check=False)
    return rehearsed(module, inputs, deps)


def _verified(program: Captured, deps: DependencyGraph, kind: str) -> Any:
    """The largest relative error, None where there is no such group, or the reason in words."""
    kept = {g.name: half(g) for g in deps.groups if g.kind == kind and g.size > g.blocks}
    if not kept:
        return None
    try:
        cut = removal(deps, kept)
        compact = rewrite(program.graph_module, cut)
        return verify(program.graph_module, compact, cut, program.inputs)
    except Exception as error:
        return reason(error)


def prunable_share(deps: DependencyGraph) -> float:
    """Share of all parameters that lie in a row or column of a chain, bilinear or head group."""
    touched = 0
    for name, shape in deps.parameters.items():
        kept = 1.0
        for dim, size in enumerate(shape):
            owned = {
                index
                for group in deps.groups
                if group.kind in KINDS
                for member in group.members
                if (member.parameter, member.dim) == (name, dim)
                for unit in member.indices
                for index in unit
            }
            kept *= 1 - len(owned) / max(size, 1)
        touched += (1 - kept) * torch.Size(shape).numel()
    total = sum(torch.Size(shape).numel() for shape in deps.parameters.values())
    return round(touched / max(total, 1), 4)


def held_by(deps: DependencyGraph, kind: str) -> dict[str, int]:
    """How many units each op with a fixed axis, a mixing op or an op without a rule holds."""
    counts: dict[str, int] = {}
    for group in deps.groups:
        if group.kind == kind:
            words = re.sub(r" · .*", "", group.reason)[:80]
            counts[words] = counts.get(words, 0) + group.size
    return dict(sorted(counts.items(), key=lambda item: -item[1])[:8])


def reason(error: Exception) -> str:
    """The error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def main() -> None:
    parser = argparse.ArgumentParser(description="One model type through the whole compiler.")
    parser.add_argument("type", metavar="TYPE")
    torch.set_num_threads(1)
    print("ROW " + json.dumps(cover(parser.parse_args().type)), flush=True)


if __name__ == "__main__":
    main()
