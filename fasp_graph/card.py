"""The model card of a pruned model: README.md of its folder."""

from __future__ import annotations

from typing import Any


def model_card(name: str, report: dict[str, Any]) -> str:
    """README.md of a pruned model."""
    before, after = report["params_before"], report["params_after"]
    error = report.get("verify_max_error")
    verified = "not verified" if error is None else f"{error:.1e}"
    return f"""---
library_name: fasp-graph
tags: [pruning, structured-pruning]
---
# {name}, pruned

A smaller {name}, made by [fasp_graph](https://pypi.org/project/fasp-graph/): structured pruning
found by analysing the model's own graph, with a least-squares repair of what stays.

| | before | after |
|---|---|---|
| parameters | {before:,} | {after:,} |
| bytes | {report["bytes_before"]:,} | {report["bytes_after"]:,} |

Sparsity of the layers in scope: {report["sparsity"]:.1%}. Largest relative difference between this
model and the dense model with the same units zeroed: {verified}.

```python
import fasp_graph as fg

model = fg.load("path/to/this/folder")
```

`fasp_graph.json` lists what was kept, and the sha256 of the weights.
"""
