"""Remove every second output of a layer, with Torch-Pruning and with fasp_graph; who is right?

    pip install --no-deps torch-pruning
    python -m benchmarks.against_torch_pruning [--models gpt2,bert] [--output build/against.json]

Layers: each linear layer or convolution whose outputs fasp_graph finds prunable (chain, bilinear
or head), one of those whose names differ by numbers only. Both tools are told nothing but the
model, its example inputs and the layer: no num_heads, no ignored layers. In float64.

correct   equals the original with the same rows and columns set to zero, to 1e-6 of its outputs
wrong     runs, gives other numbers, says nothing
nothing   the layer is as large as before, without a word
error     raises, in pruning or in the forward pass after it
hang      no result in 20 seconds of processor time
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import re
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import models_zoo
from fasp_graph.prune import Program, read
from passes.capture import as_args
from passes.errors import FaspGraphError
from passes.groups import Group
from passes.removal import removal
from passes.rewrite import rewrite
from passes.verify import verify

OUTCOMES = ("correct", "wrong", "nothing", "error", "hang")
KINDS = ("chain", "bilinear", "head")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TOOLS = ("torch-pruning", "fasp_graph")


def compare(name: str) -> list[dict[str, str]]:
    """A row for each layer of a zoo model that is tried."""
    entry = models_zoo.load(name)
    model = entry.model.eval().double()
    inputs = _double(as_args(entry.inputs))
    program = read(model, inputs[1] or inputs[0])
    return [
        {
            "model": name,
            "layer": layer,
            "kind": group.kind,
            "torch-pruning": _outcome(lambda layer=layer: _theirs(model, inputs, layer)),
            "fasp_graph": _outcome(lambda group=group: _ours(program, group)),
        }
        for layer, group in _layers(model, program)
    ]


def _layers(model: nn.Module, program: Program) -> Iterator[tuple[str, Group]]:
    seen = set()
    for group in program.deps.groups:
        for member in group.members if group.kind in KINDS else ():
            layer, _, last = member.parameter.rpartition(".")
            pattern = re.sub(r"\d+", "#", layer)
            if last != "weight" or member.dim != 0 or pattern in seen:
                continue
            if isinstance(model.get_submodule(layer), LAYERS):
                seen.add(pattern)
                yield layer, group


def _ours(program: Program, group: Group) -> str:
    kept = tuple(range(1, group.size, 2))
    cut = removal(program.deps, {group.name: kept})
    dense = program.captured.graph_module
    verify(dense, rewrite(dense, cut), cut, program.captured.inputs, 0)
    return "correct"


def _theirs(model: nn.Module, inputs: Any, layer: str) -> str:
    """Torch-Pruning on a copy, against another copy with the same rows and columns zeroed."""
    import torch_pruning as tp

    small, masked = copy.deepcopy(model), copy.deepcopy(model)
    example: Any = dict(inputs[1]) if inputs[1] else inputs[0]
    graph = tp.DependencyGraph().build_dependency(
        small, example_inputs=example, output_transform=_floats
    )
    root = small.get_submodule(layer)
    before = root.weight.shape
    remove = tp.prune_linear_out_channels
    if not isinstance(root, nn.Linear):
        remove = tp.prune_conv_out_channels
    group = graph.get_pruning_group(root, remove, idxs=list(range(0, before[0], 2)))
    names = {module: name for name, module in small.named_modules()}
    with torch.no_grad():
        for dependency, indices in group:
            target = dependency.target.module
            if isinstance(target, LAYERS):
                outputs = graph.is_out_channel_pruning_fn(dependency.handler)
                _zero(masked.get_submodule(names[target]), indices, outputs)
        group.prune()
        if root.weight.shape == before:
            return "nothing"
        after, expected = (_floats(m(*inputs[0], **inputs[1])) for m in (small, masked))
    same = len(after) == len(expected) and all(map(_close, after, expected))
    return "correct" if same else "wrong"


def _zero(module: nn.Module, indices: list[int], outputs: bool) -> None:
    weight: Any = module.weight
    if not outputs:
        weight[:, indices] = 0
        return
    weight[indices] = 0
    if module.bias is not None:
        module.bias[indices] = 0  # type: ignore[operator,index]


def _close(one: Tensor, other: Tensor) -> bool:
    scale = float(other.abs().max())
    return one.shape == other.shape and bool((one - other).abs().max() <= 1e-6 * max(scale, 1e-6))


def _floats(value: Any) -> list[Tensor]:
    leaves = tree_leaves(value)
    return [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point()]


def _double(inputs: Any) -> Any:
    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double() if floating else value

    return tuple(map(cast, inputs[0])), {name: cast(value) for name, value in inputs[1].items()}


def _outcome(trial: Any) -> str:
    try:
        with _limit(20):
            return trial()
    except TimeoutError:
        return "hang"
    except FaspGraphError as error:
        return f"error: {error}"[:300]
    except Exception as error:  # what the other tool raises is the finding
        return f"error: {type(error).__name__}: {error}"[:300]


@contextmanager
def _limit(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def counts(rows: list[dict[str, str]]) -> dict[str, dict[str, int]]:
    """tool -> outcome -> layers."""
    found = {tool: Counter(row[tool].split(":")[0] for row in rows) for tool in TOOLS}
    return {tool: {outcome: held[outcome] for outcome in OUTCOMES} for tool, held in found.items()}


def main() -> None:
    """Compare, print the table, write JSON."""
    parser = argparse.ArgumentParser(description="Torch-Pruning and fasp_graph on the zoo.")
    parser.add_argument("--models", default=",".join(models_zoo.names()))
    parser.add_argument("--output", type=Path, default=Path("build/against.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.models.split(",")
    console = Console(stderr=True)
    rows = [row for name in track(names, "models", console=console) for row in compare(name)]
    found = {
        "torch": torch.__version__,
        "torch-pruning": importlib.metadata.version("torch-pruning"),
        "models": len(names),
        "layers": len(rows),
        "counts": counts(rows),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = Table("tool", *OUTCOMES, title=f"{len(rows)} layers of {len(names)} models")
    for tool, held in found["counts"].items():
        table.add_row(tool, *map(str, held.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
