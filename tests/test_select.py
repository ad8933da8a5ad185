"""Counts of a budget with one ratio, and with a factor for each group."""

import pytest
import torch
from torch import nn

from fasp_graph import analyze
from passes.select import allocate


@pytest.fixture(scope="module")
def deps():
    layers = [nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)]
    return analyze(nn.Sequential(*layers), torch.randn(2, 5))


def chains(deps):
    return [group for group in deps.groups if group.kind == "chain"]


@pytest.mark.parametrize("factor", [0.5, 0.6])
def test_a_factor_for_all_groups_changes_the_ratio_only(deps, factor):
    groups = chains(deps)
    uniform = allocate(deps, groups, 0.85)

    leaned = allocate(deps, groups, 0.85, lean={group.name: factor for group in groups})

    assert uniform.ratio < 1 < leaned.ratio
    assert leaned.keep == uniform.keep and leaned.sparsity == uniform.sparsity


def test_a_budget_that_needs_a_ratio_beyond_one_is_met(deps):
    first, second = chains(deps)

    budget = allocate(deps, [first, second], 0.95, lean={first.name: 1.0, second.name: 0.5})

    assert budget.ratio > 1
    assert budget.sparsity == pytest.approx(0.95, abs=0.02)
    assert budget.keep[first.name] == 1 < budget.keep[second.name]
