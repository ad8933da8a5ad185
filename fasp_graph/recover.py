"""recover: a short training of a pruned model, on text alone or towards the dense model.

The losses stand in fasp_graph/losses.py, the course in fasp_graph/training.py. Needs the extra:
pip install 'fasp-graph[recover]'.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from .emit.current import current
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
    graph = current(pruned.graph_module, trained, pruned.inputs, pruned.dynamic_shapes)
    seconds = {**pruned.report.seconds, "recover": time.perf_counter() - started}
    report = replace(pruned.report, seconds=seconds)
    return replace(pruned, model=trained, graph_module=graph.graph_module, report=report)
