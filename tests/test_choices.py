"""Routing by max, argmax, sort and argsort: experts go with their router's rows, at least as many
stay as are chosen; where all of a sorted axis is used, it stays.
"""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import fasp_graph as fg
from passes.errors import VerificationError

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))


class Routed(nn.Module):
    """Six experts of one matrix each; `forward` routes."""

    def __init__(self, route):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.router, self.leave = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(8, 5)
        self.experts, self.read = nn.Parameter(torch.randn(6, 8, 8) * 0.3), nn.Linear(6, 5)
        self.route = route

    def forward(self, x):
        return self.route(self, torch.relu(self.enter(x)))

    def at(self, x, places):
        return torch.bmm(x[:, None], self.experts[places])[:, 0]


def largest(m, x):
    value, place = m.router(x).max(-1)
    return m.leave(value[:, None] * m.at(x, place))


def likeliest(m, x):
    value, place = m.router(x).softmax(-1).max(-1)
    return m.leave(value[:, None] * m.at(x, place))


def two_of(descending):
    def route(m, x):
        values, places = m.router(x).sort(-1, descending=descending)
        return m.leave(sum(values[:, k : k + 1] * m.at(x, places[:, k]) for k in range(2)))

    return route


def first_of_argsort(m, x):
    scores = m.router(x).softmax(-1)
    place = scores.argsort(-1, descending=True)[:, 0]
    return m.leave(scores.gather(1, place[:, None]) * m.at(x, place))


def last_of_argsort(m, x):
    return m.leave(m.at(x, m.router(x).argsort(-1)[:, -1]))


def last_two_of(descending):
    def route(m, x):
        values, places = m.router(x).sort(-1, descending=descending)
        values, places = values[:, -2:], places[:, -2:]
        return m.leave(sum(values[:, k : k + 1] * m.at(x, places[:, k]) for k in range(2)))

    return route


def smallest(m, x):
    value, place = m.router(x).min(-1)
    return m.leave(value[:, None] * m.at(x, place))


def smallest_place(m, x):
    return m.leave(m.at(x, m.router(x).argmin(-1)))


def smallest_two(m, x):
    values, places = m.router(x).topk(2, -1, largest=False)
    return m.leave(sum(values[:, k : k + 1] * m.at(x, places[:, k]) for k in range(2)))


def least_value(m, x):
    return m.leave(x * m.router(x).amin(-1, keepdim=True) + m.router(x).min(-1)[0][:, None])


def first_and_last(m, x):
    places = m.router(x).argsort(-1)
    return m.leave(m.at(x, places[:, 0]) + m.at(x, places[:, -1]))


def from_the_front_to_the_end(m, x):
    places = m.router(x).argsort(-1)[:, 2:]
    return m.leave(sum(m.at(x, places[:, k]) for k in range(4)))


def of_integers(m, x):
    return m.leave(m.at(x, (m.router(x) * 4).round().long().argmax(-1)))


def of_truths(m, x):
    return m.leave(m.at(x, (m.router(x) > 0).int().argmin(-1)))


def all_sorted(m, x):
    return m.read(m.router(x).sort(-1)[0])


@pytest.mark.parametrize(
    ("route", "least"),
    [
        (largest, 1),
        (likeliest, 1),
        (two_of(descending=True), 2),
        (two_of(descending=False), 2),
        (first_of_argsort, 1),
        (last_of_argsort, 1),
        (last_two_of(descending=True), 2),
        (last_two_of(descending=False), 2),
        (smallest, 1),
        (smallest_place, 1),
        (smallest_two, 2),
    ],
)
def test_experts_go_with_their_routers_rows(route, least):
    config = fg.Config(sparsity=0.5, method="magnitude", kinds=("head",), check=True)

    pruned = fg.prune(Routed(route).eval(), X, None, config)

    (group,) = [pruned.deps[name] for name in pruned.plan.kept]
    assert (group.kind, group.size, group.least) == ("head", 6, least)
    assert {("router.weight", 0), ("experts", 0)} <= {(m.parameter, m.dim) for m in group.members}
    kept = list(pruned.plan.kept[group.name])
    assert pruned.model.experts.shape[0] == len(kept) < 6
    torch.testing.assert_close(pruned.model.router.weight, Routed(route).router.weight[kept])


@pytest.mark.parametrize("route", [all_sorted, first_and_last, from_the_front_to_the_end])
def test_places_that_depend_on_the_number_stay(route):
    deps = fg.analyze(Routed(route).eval(), X, check=True)

    rows = ("router.weight", 0)
    (group,) = [g for g in deps.groups if rows in [(m.parameter, m.dim) for m in g.members]]
    assert group.kind == "frozen"
    assert "sort" in group.reason


@pytest.mark.parametrize("route", [of_integers, of_truths])
def test_choices_among_integers_stay(route):
    """No integer is less than all others, so none can stand for what is removed."""
    deps = fg.analyze(Routed(route).eval(), X, check=True)

    (group,) = [g for g in deps.groups if ("experts", 0) in _members(g)]
    assert group.kind == "frozen" and "of integers" in group.reason


def test_a_minimum_without_its_place_is_a_reduction():
    deps = fg.analyze(Routed(least_value).eval(), X, check=True)

    rows = ("router.weight", 0)
    (group,) = [g for g in deps.groups if rows in [(m.parameter, m.dim) for m in g.members]]
    assert group.kind == "frozen" and "mixed by amin" in group.reason


class Codes(nn.Module):
    """The nearest of ten codes stands for each vector."""

    def __init__(self, look_up):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.codes, self.leave = nn.Linear(6, 4), nn.Embedding(10, 4), nn.Linear(4, 5)
        self.look_up = look_up

    def forward(self, x):
        z, table = self.enter(x), self.codes.weight
        far = (z * z).sum(-1, keepdim=True) - 2 * z @ table.t() + (table * table).sum(-1)
        return self.leave(self.look_up(self.codes, far.argmin(-1)))


def test_codes_that_an_index_picks_go_like_experts():
    config = fg.Config(sparsity=0.2, method="magnitude", kinds=("head",), check=True)

    pruned = fg.prune(Codes(lambda codes, at: codes(at)).eval(), X, None, config)

    (name,) = pruned.plan.kept
    assert [(m.parameter, m.dim) for m in pruned.deps[name].members] == [("codes.weight", 0)]
    assert pruned.model.codes.weight.shape == (len(pruned.plan.kept[name]), 4) != (10, 4)


def test_codes_that_other_indices_pick_as_well_stay():
    def twice(codes, at):
        return codes(at) + codes(torch.arange(len(at)) % 3)

    deps = fg.analyze(Codes(twice).eval(), X, check=True)

    (group,) = [g for g in deps.groups if ("codes.weight", 0) in _members(g)]
    assert group.kind == "frozen" and "embedding" in group.reason


def _members(group):
    return [(m.parameter, m.dim) for m in group.members]


def clamped(m, x):
    return m.leave(m.at(x, m.router(x).argmax(-1).clamp(max=4)))


def beside_a_shared_one(m, x):
    chosen = m.router(x).topk(2, -1)[1]
    both = torch.cat([torch.zeros(len(x), 1, dtype=torch.long), chosen], 1)
    return m.leave(sum(m.at(x, both[:, k]) for k in range(3)))


def also_a_number(m, x):
    place = m.router(x).argmax(-1)
    return m.leave(m.at(x, place)) * place.float()[:, None]


def also_an_output(m, x):
    place = m.router(x).argmax(-1)
    return m.leave(m.at(x, place)), place


def also_one_of_more(m, x):
    place = m.router(x).argmax(-1)
    return m.leave(m.at(x, place)), nn.functional.one_hot(place, 9).float()


def also_of_another_table(m, x):
    place = m.router(x).argmax(-1)
    return m.leave(m.at(x, place)) + torch.arange(9.0)[place][:, None]


def also_the_last_one(m, x):
    place = m.router(x).argmax(-1)
    return m.leave(m.at(x, place)) * torch.where(place == 5, 2.0, 1.0)[:, None]


@pytest.mark.parametrize(
    "route",
    [
        also_the_last_one,
        clamped,
        beside_a_shared_one,
        also_a_number,
        also_an_output,
        also_one_of_more,
        also_of_another_table,
    ],
)
def test_an_index_whose_number_matters_keeps_its_axis(route):
    deps = fg.analyze(Routed(route).eval(), X, check=True)

    rows = ("router.weight", 0)
    (group,) = [g for g in deps.groups if rows in [(m.parameter, m.dim) for m in g.members]]
    assert group.kind == "frozen", group


def selected(m, x):
    scores = m.router(x)
    return m.leave(torch.bmm(x[:, None], m.experts.index_select(0, scores.argmax(-1)))[:, 0])


def clamped_beyond(m, x):
    return m.leave(m.at(x, m.router(x).argmax(-1).clamp(0, 5)))


def of_two_routers(m, x):
    both = torch.cat([m.router(x).argmax(-1, True), (m.router(x) * -1).argmax(-1, True)], 1)
    return m.leave(sum(m.at(x, both[:, k]) for k in range(2)))


def none_beyond(m, x):
    place = m.router(x).argmax(-1)
    return m.leave(m.at(x, place)) * torch.where(place == 6, 2.0, 1.0)[:, None]


@pytest.mark.parametrize("route", [selected, clamped_beyond, of_two_routers, none_beyond])
def test_an_index_that_is_only_moved_and_looked_up_frees_its_axis(route):
    config = fg.Config(sparsity=0.4, method="magnitude", kinds=("head",), check=True)

    pruned = fg.prune(Routed(route).eval(), X, None, config)

    (group,) = pruned.plan.kept
    assert {("router.weight", 0), ("experts", 0)} <= {
        (m.parameter, m.dim) for m in pruned.deps[group].members
    }


def in_rows_below(m, x):
    places = m.router(x).argmax(-1)
    return m.leave(m.at(x, torch.cat([places[:3], places[3:]])))


@pytest.mark.parametrize(("route", "least"), [(of_two_routers, 2), (in_rows_below, 1)])
def test_choices_side_by_side_need_as_many_positions_as_they_take(route, least):
    deps = fg.analyze(Routed(route).eval(), X)

    (group,) = [
        g for g in deps.groups if ("router.weight", 0) in {(m.parameter, m.dim) for m in g.members}
    ]
    assert group.least == least


class NearlyTied(nn.Module):
    """A choice between two sums that are equal but for rounding, which depends on the width."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 200), nn.Linear(200, 1)

    def forward(self, x):
        h = torch.relu(self.a(x))
        place = torch.stack([(h * 0.1).sum(-1), h.sum(-1) * 0.1], -1).argmax(-1, keepdim=True)
        out = self.b(h)
        return torch.cat([out, out + 1], -1).gather(-1, place)


def test_ties_that_rounding_breaks_are_no_difference(monkeypatch):
    config = fg.Config(sparsity=0.4, method="magnitude", kinds=("bilinear",))

    assert fg.prune(NearlyTied().eval(), X, None, config).plan.kept.keys() == {"a.0"}

    monkeypatch.setattr("passes.verify.DECIMALS", 17)  # as many as float64 has
    with pytest.raises(VerificationError, match="gather"):
        fg.prune(NearlyTied().eval(), X, None, config)


SMALL = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2},
    **{"max_position_embeddings": 64, "pad_token_id": 0},
}


@pytest.mark.parametrize(
    ("kind", "sizes", "expected"),
    [
        (
            "glm4_moe",
            {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 16},
            {(4, 2), (2, 1)},  # one expert of each group, in which two are looked at; whole groups
        ),
        ("phimoe", {"num_local_experts": 8}, {(8, 2)}),
    ],
)
def test_experts_of_routers_that_choose_twice_go_whole(kind, sizes, expected):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL, **sizes)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(0, 64, (3, 11))

    pruned = fg.prune(model, ids, [ids], fg.Config(0.1, kinds=("head",), method="magnitude"))

    experts = [g for g in pruned.deps.groups if g.kind == "head" and not g.consumers]
    assert {(group.size, group.least) for group in experts} == expected
    assert any(len(pruned.plan.kept[group.name]) < group.size for group in experts)
    assert pruned.report.verify_max_error < 1e-9
    other = torch.randint(0, 64, (2, 7))
    torch.testing.assert_close(pruned.model(other).logits, pruned.graph_module(other).logits)
