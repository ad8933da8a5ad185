"""The page: data that survives hostile names, no network, what a plan keeps."""

import json
import re

import pytest
import torch
from programs_of_zoo import program
from torch import nn

import fasp_graph as fg
from fasp_graph.pages.view import curve_points, page_data, to_html

NAME = "</script><img src=x onerror=alert(1)>&"


@pytest.fixture
def hostile():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module(NAME, nn.Linear(5, 8))
    model.add_module("act", nn.ReLU())
    model.add_module("out", nn.Linear(8, 3))
    return model


def embedded(page):
    return re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]


def test_names_are_data_and_never_markup(hostile, tmp_path):
    page = to_html(fg.analyze(hostile, torch.randn(3, 5)), tmp_path / "graph.html").read_text()

    text = embedded(page)
    assert not set("<>&") & set(text)
    assert NAME in [module["name"] for module in json.loads(text)["modules"]]
    assert "innerHTML" not in page and "insertAdjacentHTML" not in page


def test_the_page_asks_nothing_of_the_network(hostile, tmp_path):
    page = to_html(fg.analyze(hostile, torch.randn(3, 5)), tmp_path / "graph.html").read_text()

    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page.replace(embedded(page), ""))


def test_a_plan_adds_what_is_kept(hostile):
    inputs = torch.randn(3, 5)
    result = fg.prune(hostile, inputs, [torch.randn(40, 5)], fg.Config(sparsity=0.5))

    data = page_data(result.deps, result.plan)

    chains = [group for group in data["groups"] if group["kind"] == "chain"]
    assert data["planned"] and [group["size"] for group in chains] == [8]
    assert chains[0]["kept"] == len(result.plan.kept[chains[0]["name"]]) < 8
    frozen = [group for group in data["groups"] if group["kind"] == "frozen"]
    assert frozen and all(group["reason"] for group in frozen)


def test_a_curve_is_thinned_and_says_where_the_plan_stopped():
    curve = [0.0, *(1.5**k for k in range(200))]

    (stop, *points) = curve_points(curve, 60)

    assert stop == [60, pytest.approx(1.5**59, rel=1e-3)]
    assert [k for k, _ in points] == sorted({k for k, _ in points}) and len(points) == 48
    assert (points[0], points[-1][0]) == ([0, 0.0], 200)


@pytest.mark.parametrize("curve", [(), (0.0,), (0.0, 0.0), (0.0, float("inf"))])
def test_without_errors_there_is_no_curve(curve):
    assert curve_points(curve, 0) == []


def test_a_tied_weight_stands_in_the_page_under_each_of_its_names():
    entry, known = program("llama")

    page = page_data(known.deps)

    shown = [held for module in page["modules"] for held in module["parameters"]]
    named = {member["parameter"] for group in page["groups"] for member in group["members"]}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= named
    assert named <= {held["name"] for held in shown}
    assert page["before"] == sum(p.numel() for p in entry.model.parameters())
