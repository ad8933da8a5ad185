"""The model card of a pruned model: README.md of its folder."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from passes.names import folded, pattern

from ..report import GroupReport
from .origin import Pruning

_PLAIN = """from transformers import {auto}

model = {auto}.from_pretrained("path/to/this/folder")"""
_OURS = """import fasp_graph as fg

model = fg.load("path/to/this/folder")"""
_UNSAID = {"calibration data": "not stated", "perplexity": "not measured"}


def model_card(model: Any, pruning: Pruning, facts: Mapping[str, Any], plain: bool) -> str:
    """README.md of a pruned model. `facts`: further lines (data, perplexity before and after)."""
    name, report = type(model).__name__, pruning.report
    before, after = report.params_before, report.params_after
    ways, costs = pruning.emission.ways, pruning.emission.costs
    counts = ", ".join(f"{n} {way}" for way, n in sorted(Counter(ways.values()).items()))
    unsaid = {k: v for k, v in _UNSAID.items() if not any(said.startswith(k) for said in facts)}
    lines = fact_lines({"method": pruning.config.method, **facts, **unsaid})
    if costs:
        lines += f"- elements that adapters copy: {sum(costs.values()):,} per token\n"
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
| bytes | {report.bytes_before:,} | {report.bytes_after:,} |

Removed: {report.removed:.1%} of all parameters, {report.sparsity:.1%} of those in scope.
Largest relative difference between this model and the dense model with the same units zeroed:
{report.verify_max_error:.1e}.

| groups | kind | units | kept |
|---|---|---|---|
{_rows(report.groups)}
- groups: {counts}
{lines}
```python
{_PLAIN.format(auto=auto_class(model)) if plain else _OURS}
```

`fasp_graph.json` lists what was kept, and the sha256 of weights and configuration.
"""


def fact_lines(facts: Mapping[str, Any]) -> str:
    """One line of Markdown each."""
    return "".join(f"- {key}: {value}\n" for key, value in facts.items())


def _rows(groups: Iterable[GroupReport]) -> str:
    """A row for the groups that differ by numbers in their names only, with the range of kept."""
    alike: dict[tuple[str, str, int], list[GroupReport]] = {}
    for group in groups:
        alike.setdefault((pattern(group.name), group.kind, group.units), []).append(group)
    rows = ""
    for (_, kind, units), held in alike.items():
        names = ", ".join(map(_quoted, folded(group.name for group in held)))
        kept = [group.kept for group in held]
        span = str(min(kept)) if min(kept) == max(kept) else f"{min(kept)} to {max(kept)}"
        rows += f"| {names} | {kind} | {units} | {span} |\n"
    return rows


def _quoted(name: str) -> str:
    """A name as code in a cell of a table; whatever stands in it, it is no markup."""
    plain = html.escape(" ".join(name.split())).replace("`", "'").replace("|", "&#124;")
    return f"`{plain}`"


def auto_class(model: Any) -> str:
    """The Auto class of transformers that makes the model's class; the class itself where none."""
    from transformers.models.auto import modeling_auto

    kind, last = type(model).__name__, "AutoModelForPreTraining"  # knows many of other tasks too
    autos = [name for name in vars(modeling_auto) if name.startswith("AutoModel")]
    for name in sorted(autos, key=lambda name: name == last):
        known = getattr(getattr(modeling_auto, name), "_model_mapping", None)
        made = known.get(type(model.config), ()) if known else ()
        if kind in (one.__name__ for one in (made if isinstance(made, tuple) else (made,))):
            return name
    return kind
