"""Every zoo model: golden listing of its groups; half of every chain, half of every bilinear
group verifies at 1e-9.
"""

from pathlib import Path

import pytest
import torch

import models_zoo
from passes.capture import capture
from passes.couple import couple
from passes.labels import propagate
from passes.rewrite import removal, rewrite
from passes.verify import verify

GOLDEN = Path(__file__).parent / "golden"
EXACT = 1e-9


def captured(name):
    entry = models_zoo.load(name)
    program = capture(entry.model, entry.inputs)
    labels = propagate(program.graph_module, program.inputs, check=True)
    return program, couple(labels, dict(program.graph_module.named_parameters()))


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
    program, deps = captured(name)

    golden = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        golden.write_text(deps.listing() + "\n")
    elif not golden.exists():
        pytest.skip("no golden listing yet: run with --update-golden")
    assert deps.listing() + "\n" == golden.read_text()

    for kind in ("chain", "bilinear"):
        kept = {g.name: half(g) for g in deps.groups if g.kind == kind}
        if not kept:
            assert name == "resnet" and kind == "bilinear"
            continue
        cut = removal(deps, kept)
        compact = rewrite(program.graph_module, cut)
        before = sum(p.numel() for p in program.graph_module.parameters())
        assert sum(p.numel() for p in compact.parameters()) < before
        assert verify(program.graph_module, compact, cut, program.inputs) <= EXACT


@pytest.mark.parametrize("name", [n for n in models_zoo.names() if n not in ("llama", "opt")])
def test_each_chain_group_alone_is_exact(name):
    program, deps = captured(name)

    chains = [g for g in deps.groups if g.kind == "chain"]
    assert chains
    for group in chains:
        cut = removal(deps, {group.name: half(group)})
        compact = rewrite(program.graph_module, cut)
        assert verify(program.graph_module, compact, cut, program.inputs) <= EXACT
