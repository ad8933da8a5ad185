"""Remove every second output of a layer, with Torch-Pruning and with fasp_graph; who is right?

    pip install --no-deps torch-pruning
    python -m benchmarks.against_torch_pruning [--models gpt2,bert] [--output build/against.json]

Models that the output file holds are kept; `--page docs/comparison.md` writes the table there.

Layers: each linear layer or convolution whose outputs fasp_graph finds prunable (chain or
bilinear), one of those whose names differ by numbers only. Both tools are told nothing but the
model, its example inputs and the layer: no num_heads, no ignored layers. In float64, one thread,
each model in a process of its own.

correct   equals the user's model with the same rows and columns set to zero, to 1e-6 of its outputs
wrong     runs, gives other numbers, says nothing
nothing   the layer is as large as before, without a word
refused   raises, in pruning or in the forward pass after it
hang      no result in `--seconds` of processor time
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import multiprocessing
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
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import models_zoo
from fasp_graph.prune import Program, read
from passes.capture import as_args
from passes.errors import FaspGraphError
from passes.groups import Group
from passes.removal import removal
from passes.rewrite import rewrite

from .accuracy_page import fill

OUTCOMES = ("correct", "wrong", "nothing", "refused", "hang")
KINDS = ("chain", "bilinear")
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TOOLS = ("torch-pruning", "fasp_graph")


def compare(name: str, seconds: int) -> list[dict[str, str]]:
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
            "torch-pruning": _outcome(lambda at=layer: _theirs(model, inputs, at), seconds),
            "fasp_graph": _outcome(lambda g=group: _ours(model, inputs, program, g), seconds),
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


def _ours(model: nn.Module, inputs: Any, program: Program, group: Group) -> str:
    """The compact graph against a copy of the user's model with the same indices zeroed."""
    gone = list(range(0, group.size, 2))
    cut = removal(program.deps, {group.name: tuple(range(1, group.size, 2))})
    small, masked = rewrite(program.captured.graph_module, cut), copy.deepcopy(model)
    parameters = dict(masked.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for member in group.members:
            if member.parameter in parameters:
                index = torch.from_numpy(member.indices[gone].ravel())
                parameters[member.parameter].index_fill_(member.dim, index, 0)
        after, expected = (_floats(m(*inputs[0], **inputs[1])) for m in (small, masked))
    return _judged(after, expected)


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
    return _judged(after, expected)


def _judged(after: list[Tensor], expected: list[Tensor]) -> str:
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


def _outcome(trial: Any, seconds: int) -> str:
    try:
        with _limit(seconds):
            return trial()
    except TimeoutError:
        return "hang"
    except FaspGraphError as error:
        return f"refused: {error}"[:300]
    except Exception as error:  # what the other tool raises is the finding
        return f"refused: {type(error).__name__}: {error}"[:300]


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


def apart(name: str, seconds: int, limit: int) -> dict[str, Any]:
    """What a process of its own finds for one model, or why it found nothing."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            found = pool.apply_async(compare, (name, seconds)).get(limit)
        except multiprocessing.TimeoutError:
            return {"rows": [], "left_out": {name: f"not done in {limit} s"}}
    return {"rows": found, "left_out": {}}


def result(parts: list[dict[str, Any]], names: list[str], seconds: int) -> dict[str, Any]:
    """What is written: the versions, the setting, the counts, a row for each layer."""
    rows = [row for part in parts for row in part["rows"]]
    return {
        "torch": torch.__version__,
        "torch-pruning": importlib.metadata.version("torch-pruning"),
        "seconds": seconds,
        "models": names,
        "layers": len(rows),
        "counts": counts(rows),
        "left_out": {name: why for part in parts for name, why in part["left_out"].items()},
        "rows": rows,
    }


def earlier(path: Path) -> dict[str, Any]:
    """What an earlier run found; models that it left out are tried again."""
    if not path.is_file():
        return {"models": [], "rows": [], "left_out": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    models = [name for name in found["models"] if name not in found["left_out"]]
    return {"models": models, "rows": found["rows"], "left_out": {}}


def page_table(found: dict[str, Any]) -> str:
    """The counts, and what makes the rows of a kind; as docs/comparison.md shows them."""
    kinds = [("all", found["rows"])]
    kinds += [(k, [row for row in found["rows"] if row["kind"] == k]) for k in KINDS]
    lines = [f"| layers | tool | {' | '.join(OUTCOMES)} |", "|---" * (len(OUTCOMES) + 2) + "|"]
    for kind, rows in kinds:
        for tool, held in counts(rows).items():
            cells = " | ".join(map(str, held.values()))
            lines.append(f"| {kind} ({len(rows)}) | {tool} | {cells} |")
    left = ", ".join(f"{name}: {why}" for name, why in found["left_out"].items()) or "none"
    about = (
        f"{len(found['rows'])} layers of {len(found['models'])} models; torch "
        f"{found['torch'].partition('+')[0]}, Torch-Pruning {found['torch-pruning']}; "
        f"{found['seconds']} s of processor time for each; left out: {left}."
    )
    return "\n".join([*lines, "", about])


def main() -> None:
    """Compare, print the table, write JSON."""
    parser = argparse.ArgumentParser(description="Torch-Pruning and fasp_graph on the zoo.")
    parser.add_argument("--models", default=",".join(models_zoo.names()))
    parser.add_argument("--output", type=Path, default=Path("build/against.json"))
    parser.add_argument("--page", type=Path, help="a page whose table is written anew")
    parser.add_argument("--seconds", type=int, default=10, help="of processor time for a layer")
    parser.add_argument("--limit", type=int, default=1800, help="seconds on the clock for a model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.models.split(",")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    before = earlier(options.output)
    parts, done = [before], before["models"]
    for name in track([n for n in names if n not in done], "models", console=Console(stderr=True)):
        parts.append(apart(name, options.seconds, options.limit))
        done = [*done, name]
        found = result(parts, done, options.seconds)
        options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found = result(parts, done, options.seconds)
    if options.page is not None:
        text = options.page.read_text(encoding="utf-8")
        options.page.write_text(fill(text, "against", page_table(found)), encoding="utf-8")
    print(page_table(found))


if __name__ == "__main__":
    main()
