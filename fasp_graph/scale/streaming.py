"""streaming: prune a folder of safetensors whose weights do not fit into memory.

    capture    on the configuration's shapes alone, then compared with the model itself
    walk       a weight is read at its use and dropped after it; a repaired weight is written to
               the work folder when its group is finished, and read from there
    verify     compact against masked dense graph, weights read as each op needs them
    emit       the class's own code against the compact graph, likewise
    write      one tensor after the other, in shards; the folder appears when all are there

All checks of `prune` are made, on all weights; none is left out. Memory is the largest weight (in
verification the embedding table in float64), the live activations, and what one consumer needs:
its Gram matrix and a solve.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from passes.groups import DependencyGraph
from passes.select import Plan

from ..config import Config
from ..decide import Progress
from ..folders.huggingface import refuse_foreign, save
from ..folders.lazyfolder import open_folder, return_freed_memory
from ..prune import prune
from ..report import Report
from .journal import close, work_folder


@dataclass(frozen=True)
class Streamed:
    """What `prune_folder` wrote, and how it came about."""

    folder: Path
    plan: Plan
    report: Report
    deps: DependencyGraph


def prune_folder(
    folder: str | os.PathLike[str],
    inputs: Any,
    calibration: Iterable[Any],
    config: Config,
    output: str | os.PathLike[str],
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    progress: Progress | None = None,
) -> Streamed:
    """Prune the transformers model in `folder` into `output`, holding one weight at a time.

    The result is what `prune` and `save` write. Interrupted, the same call goes on from the last
    finished group. `config.allocation` must be uniform: a sensitivity needs all weights at once.
    """
    refuse_foreign(Path(os.path.abspath(output)))
    model = open_folder(folder)
    return_freed_memory()
    work = work_folder(output)
    pruned = prune(model, inputs, calibration, config, progress, work=work)
    written = save(pruned, output, tokenizer, max_shard_size)
    close(work)
    return Streamed(written, pruned.plan, pruned.report, pruned.deps)
