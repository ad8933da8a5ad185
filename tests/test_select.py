"""Counts of a budget with one ratio, and with a factor for each group."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from programs_of_zoo import program
from torch import nn

from fasp_graph import Config, analyze, prune
from fasp_graph.config import METHODS, Passes
from passes.cost import parameter_cost, scope
from passes.errors import BudgetError, ConfigError
from passes.select import _count, allocate, select


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


def test_every_block_keeps_its_own_best_units():
    group = SimpleNamespace(blocks=2, block_of=[0, 0, 0, 0, 1, 1, 1, 1], size=8, pieces=())
    utility = torch.tensor([4.0, 1.0, 3.0, 2.0, 0.1, 0.4, 0.2, 0.3])

    assert sorted(select(group, utility, 2)) == [0, 2, 5, 7]
    assert sorted(select(group, utility, 1)) == [0, 5]
    assert sorted(select(group, torch.ones(8), 1)) == [0, 4]  # ties go to the lower index


def test_no_piece_of_an_axis_is_left_empty():
    pieces = (np.array([0, 1]), np.array([2]), np.array([3, 4]))
    group = SimpleNamespace(blocks=1, block_of=[0] * 5, size=5, pieces=pieces)

    assert select(group, torch.tensor([5.0, 4.0, 0.5, 3.0, 0.1]), 3) == (0, 2, 3)
    assert select(group, torch.tensor([0.3, 0.2, 4.0, 3.0, 2.0]), 3) == (0, 2, 3)


@pytest.mark.xdist_group("gqa-qk-norm")
def test_what_heads_and_channels_remove_together_is_counted_once():
    entry, known = program("gqa-qk-norm")
    config = Config(0.5, "magnitude", kinds=("chain", "bilinear", "head"))
    pruned = prune(entry.model, entry.inputs, None, config, program=known)
    groups = [group for group in pruned.deps.groups if group.name in pruned.plan.kept]
    keep = {g.name: len(pruned.plan.kept[g.name]) // g.blocks for g in groups}

    cost = parameter_cost(pruned.deps, groups)
    counted = cost.removed(keep) * cost.total

    assert {group.kind for group in groups} == {"chain", "bilinear", "head"}
    assert round(counted) == pruned.report.params_before - pruned.report.params_after


def test_the_scope_is_all_parameters_of_the_modules_that_groups_go_through():
    entry, known = program("llama-random")
    found = scope(known.deps)

    inside = [n for n, _ in entry.model.named_parameters() if re.search("self_attn|mlp", n)]
    assert found == set(inside)  # queries and keys too; no embedding, norm or head


def test_a_block_keeps_min_keep_units():
    group = SimpleNamespace(size=24, blocks=2, least=1)

    assert [_count(group, ratio, 1, 3) for ratio in (0.0, 0.5, 0.9, 1.0)] == [12, 6, 3, 3]


def test_a_step_is_kept_whole():
    group = SimpleNamespace(size=24, blocks=2, least=1)

    assert [_count(group, ratio, 4, 5) for ratio in (0.0, 0.5, 0.9, 1.0)] == [12, 8, 8, 8]
    assert [_count(group, ratio, 16, 1) for ratio in (0.0, 0.5, 1.0)] == [12, 12, 12]


def test_the_largest_budget_that_is_named_can_be_had(deps):
    groups = chains(deps)
    with pytest.raises(BudgetError, match="is the largest") as caught:
        allocate(deps, groups, 0.999)
    largest = float(re.search(r"reached: ([\d.]+) is", str(caught.value))[1])

    assert allocate(deps, groups, largest).sparsity == pytest.approx(largest, abs=2e-3)


def test_the_presets_are_those_of_their_papers():
    assert METHODS["fasp"] == Passes("fasp", "fasp", "uniform")
    assert METHODS["slimgpt"] == Passes("obs", "obs", "uniform")
    assert METHODS["flap"] == Passes("flap", "bias", "standardised")
    assert METHODS["wanda"] == Passes("fasp", "none", "uniform")
    assert METHODS["magnitude"] == Passes("magnitude", "none", "uniform")
    assert METHODS["modegpt"] == Passes("modegpt", "obs", "influence")
    assert METHODS["best"] == Passes("rotation", "outputs", "sensitivity")


def test_standardised_scores_need_scores():
    with pytest.raises(ConfigError, match="score=rotation has none: .* · help: alloc"):
        Config(allocation="standardised")
    assert Config(allocation="standardised", score="flap").passes.allocation == "standardised"
