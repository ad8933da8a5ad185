"""recover: a short training of a pruned model, on text alone or towards the dense model.

The losses stand in fasp_graph/losses.py, the course in fasp_graph/training.py. Needs the extra:
pip install 'fasp-graph[recover]'.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from passes.compare import tensors
from passes.errors import FaspGraphError
from passes.rewrite import attribute

from .folders.loading import original_name
from .prune import Pruned
from .training import Progress, Training, train


def recover(
    pruned: Pruned | nn.Module,
    data: Iterable[Any],
    tokens: int | None = None,
    lora: int = 8,
    distill: nn.Module | None = None,
    weight: float = 0.5,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Any:
    """A trained copy of `pruned`, of the same type: a Pruned, or a model that `load` returned.

    `data`: batches like the calibration's. The options are the fields of `Training`
    (fasp_graph/training.py). `tokens`: how many are trained on (for inputs that are no ids:
    samples); None: each batch once. `distill`: the dense model. `weight`: its share of the loss.
    """
    model = pruned.model if isinstance(pruned, Pruned) else pruned
    training = Training(tokens, lora, distill, weight, learning_rate, seed)
    started = time.perf_counter()
    trained = train(model, data, training, progress).model
    if not isinstance(pruned, Pruned):
        return trained
    graph = _synchronised(pruned, trained)
    seconds = {**pruned.report.seconds, "recover": time.perf_counter() - started}
    report = replace(pruned.report, seconds=seconds)
    return replace(pruned, model=trained, graph_module=graph, report=report)


def _synchronised(pruned: Pruned, model: nn.Module) -> GraphModule:
    """The compact graph with the trained weights; it must compute what the model does."""
    graph = copy.deepcopy(pruned.graph_module)
    padded = pruned.emission.padded
    with torch.no_grad():
        for name, _ in pruned.graph_module.named_parameters():
            theirs = attribute(model, original_name(name) if name in padded else name)
            ours = attribute(graph, name)
            if ours.shape == theirs.shape:
                ours.copy_(theirs)
    args, kwargs = pruned.inputs
    was = model.training
    with torch.no_grad():
        pairs = zip(
            tensors(graph(*args, **kwargs)), tensors(model.eval()(*args, **kwargs)), strict=False
        )
        agree = all(torch.allclose(a, b, 1e-3, 1e-4 * float(b.abs().max())) for a, b in pairs)
    model.train(was)
    if not agree:
        raise FaspGraphError(
            "the trained model and its graph disagree · help: recover the model that load returns"
        )
    return graph
