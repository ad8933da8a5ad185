"""The model card of a pruned model: README.md of its folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..emit.emission import Emission

_PLAIN = """from transformers import AutoModel  # or the Auto class of its task

model = AutoModel.from_pretrained("path/to/this/folder")"""
_OURS = """import fasp_graph as fg

model = fg.load("path/to/this/folder")"""


def model_card(
    name: str,
    report: Mapping[str, Any],
    facts: Mapping[str, Any],
    plain: bool,
    emission: Emission,
) -> str:
    """README.md of a pruned model. `facts`: further lines (data, perplexity before and after)."""
    before, after = report["params_before"], report["params_after"]
    error = report.get("verify_max_error")
    verified = "not verified" if error is None else f"{error:.1e}"
    ways = ", ".join(f"{n} {way}" for way, n in sorted(Counter(emission.ways.values()).items()))
    lines = "".join(f"- {key}: {value}\n" for key, value in facts.items())
    if emission.costs:
        lines += f"- elements that adapters copy: {sum(emission.costs.values()):,} per token\n"
    return f"""---
library_name: {"transformers" if plain else "fasp-graph"}
tags: [pruning, structured-pruning]
---
# {name}, pruned

A smaller {name}, made by fasp_graph: structured pruning found by analysing the model's own graph,
with a repair of what stays.

| | before | after |
|---|---|---|
| parameters | {before:,} | {after:,} |
| bytes | {report["bytes_before"]:,} | {report["bytes_after"]:,} |

Removed: {1 - after / before:.1%} of all parameters, {report["sparsity"]:.1%} of those in scope.
Largest relative difference between this model and the dense model with the same units zeroed:
{verified}.

- groups: {ways}
{lines}
```python
{_PLAIN if plain else _OURS}
```

`fasp_graph.json` lists what was kept, and the sha256 of weights and configuration.
"""
