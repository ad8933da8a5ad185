"""Every zoo model: golden listing of its groups; half of every chain, bilinear, head and width
group, by themselves and together, verifies at 1e-9.
"""

from pathlib import Path

import pytest
import torch
from programs_of_zoo import program

import models_zoo
from passes.removal import removal
from passes.rewrite import rewrite
from passes.verify import verify

GOLDEN = Path(__file__).parent / "golden"
EXACT = 1e-9


def half(group):
    """A random half of each block."""
    generator = torch.Generator().manual_seed(len(group.name))
    block = torch.tensor(group.block_of)
    kept = []
    for number in range(group.blocks):
        units = torch.nonzero(block == number).reshape(-1)
        order = torch.randperm(len(units), generator=generator)
        kept += units[order[: max(1, len(units) // 2)]].tolist()
    return tuple(sorted(kept))


@pytest.mark.parametrize("name", models_zoo.names())
def test_groups_and_exactness(name, request):
    known = program(name)[1]
    module, inputs, deps = known.captured.graph_module, known.captured.inputs, known.deps

    golden = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(deps.listing() + "\n")
    assert deps.listing() + "\n" == golden.read_text()

    kinds = {group.kind for group in deps.groups} & {"chain", "bilinear", "head", "width"}
    assert "chain" in kinds
    several = [{kind} for kind in sorted(kinds)] + [kinds - {"width"}, kinds & {"chain", "width"}]
    for chosen in dict.fromkeys(map(frozenset, several)):
        kept = {g.name: half(g) for g in deps.groups if g.kind in chosen}
        cut = removal(deps, kept)
        compact = rewrite(module, cut)
        before = sum(p.numel() for p in module.parameters())
        assert sum(p.numel() for p in compact.parameters()) < before
        assert verify(module, compact, cut, inputs) <= EXACT


@pytest.mark.parametrize("name", [n for n in models_zoo.names() if n not in ("llama", "opt")])
def test_each_chain_group_alone_is_exact(name):
    known = program(name)[1]
    module, inputs, deps = known.captured.graph_module, known.captured.inputs, known.deps

    chains = [g for g in deps.groups if g.kind == "chain"]
    assert chains
    for group in chains:
        cut = removal(deps, {group.name: half(group)})
        compact = rewrite(module, cut)
        assert verify(module, compact, cut, inputs) <= EXACT
