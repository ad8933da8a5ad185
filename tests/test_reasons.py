"""Why a group is not pruned: what decides it, with its op, module and line, and a way out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasp_graph
from passes.groups import DependencyGraph
from passes.ways_out import WAYS_OUT, way_out


class Many(nn.Module):
    """Each layer stays for a reason of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 20), nn.LayerNorm(20), nn.Linear(20, 3)
        self.picked, self.pair, self.read = nn.Linear(6, 4), nn.Linear(6, 2), nn.Linear(2, 3)
        self.sorted, self.kept = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 6] to [B, 3]."""
        pair = self.pair(x)
        y = self.read(pair + pair.flip(-1)) + self.picked(x)[:, 0:1]
        y = y + self.kept(torch.special.bessel_j0(self.sorted(x)).histc(8))
        return y + self.down(self.norm(self.up(x)))


def told(deps: DependencyGraph, group: str) -> tuple[str, str]:
    """The reason of a group, and the last line of `explain` for a weight of it alone."""
    held = deps[group]
    alone = dataclasses.replace(deps, groups=(held,))
    return held.reason, alone.explain(held.members[0].parameter).splitlines()[-1].strip()


LINE = r"test_reasons\.py:\d+ in forward"
FROZEN = {
    "down.0": (
        rf"reaches the model's output · node %add_\d -> .* · {LINE}",
        "the model's interface",
    ),
    "up.1": (r"an axis of the input x · node %x -> \(\w+, 6\)", "reason: an axis of"),
    "picked.0": (rf"selected by slice · node %slice_\d .* · {LINE}", "a layer of their own"),
    "picked.0.2": (
        rf"nothing sums it away · node %linear_\d .* module picked · {LINE}",
        "lets it go",
    ),
    "pair.0": (rf"it is a single unit · node %add .* · {LINE}", "reason: it is"),
    "sorted.0": (
        rf"no axis rule for aten.histc.default · node %histc .* · {LINE}",
        "rules.register",
    ),
    "up.0": (rf"mixed by layer_norm · node %layer_norm .* · module norm · {LINE}", "kinds=width"),
}


@pytest.fixture(scope="module")
def many() -> DependencyGraph:
    return fasp_graph.analyze(Many(), torch.randn(5, 6))


@pytest.mark.parametrize("group", FROZEN)
def test_a_reason_names_the_node_the_line_and_a_way_out(many: DependencyGraph, group: str) -> None:
    reason, last = told(many, group)

    words, way = FROZEN[group]
    assert re.fullmatch(words, reason), reason
    assert way in last, last
    assert last.startswith("reason: " if way.startswith("reason: ") else "help: ")


def test_the_command_line_ends_with_the_way_out(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    source = "import torch, test_reasons\n\n\ndef build():\n    "
    (tmp_path / "reasoned.py").write_text(
        source + "return test_reasons.Many(), torch.randn(5, 6)\n"
    )
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("inspect", "reasoned:build", "--explain", "down.bias")

    assert code == 0
    assert re.search(LINE, out.splitlines()[-2]) and "help: " in out.splitlines()[-1]


def test_a_reason_with_a_way_out_of_its_own_gets_no_other() -> None:
    assert way_out("frozen", "no axis rule for x · node %x · help: this") == ""
    assert way_out("frozen", "chosen by nobody · node %x") == "" == way_out("chain", "")
    assert all(len(way) < 80 for way in WAYS_OUT.values())
