"""The report page: curves and stages of a real run, names that are data."""

import dataclasses
import html
import math
import re

import pytest
import torch
from programs_of_zoo import program

import fasp_graph as fg
import models_zoo
from fasp_graph.pages.curves import stop_of
from fasp_graph.pages.report_page import report_page
from fasp_graph.units import in_bytes


@pytest.fixture(scope="module")
def run():
    entry = models_zoo.load("llama-random")
    said = []
    pruned = fg.prune(
        entry.model,
        entry.inputs,
        entry.calibration[:2],
        fg.Config(sparsity=0.4),
        lambda stage, done, total: said.append((stage, done, total)),
    )
    return pruned, said


def test_progress_tells_the_stages_in_order(run):
    pruned, said = run
    stages = list(dict.fromkeys(stage for stage, _, _ in said))

    assert [s for s in stages if s in pruned.report.seconds] == list(pruned.report.seconds)
    assert all(0 <= done <= total for _, done, total in said)


def test_a_curve_for_each_group_ends_where_the_plan_stopped(run):
    report = run[0].report.to_dict()
    page = report_page("llama", report, {})
    drawn = re.findall(r"<svg.*?</svg>", page)

    assert len(drawn) == len(report["groups"])
    for group, picture in zip(report["groups"], drawn, strict=True):
        points = re.findall(r"[\d.]+,[\d.]+", re.search(r"points='(.*?)'", picture)[1])
        x, y = re.search(r"cx='(.*?)' cy='(.*?)'", picture).groups()
        assert len(points) == len(group["curve"]) and f"{x},{y}" in points
        assert float(x) == pytest.approx(200 * (1 - group["kept"] / group["units"]), abs=4)
        heights = [float(point.split(",")[1]) for point in points]
        assert heights == sorted(heights, reverse=True)  # more removed, more error: upwards


@pytest.mark.parametrize("method", ["fasp", "magnitude", "best"])
def test_scores_of_what_stayed_and_went(method):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5))
    x = torch.randn(60, 7)

    pruned = fg.prune(model, x, [x, x + 1], fg.Config(sparsity=0.3, method=method))

    (group,) = pruned.report.groups
    if method == "best":
        assert math.isnan(group.score_kept) and math.isnan(group.score_removed)
    else:
        assert group.score_kept > group.score_removed > 0


def test_memory_is_told(run):
    report = run[0].report
    held = report.to_dict()["peak_memory"]

    assert held > report.bytes_before and held > 50e6  # torch alone takes more
    assert f"{in_bytes(held)} of memory at most" in report.to_text()
    page = report_page("llama", {**report.to_dict(), "peak_memory_cuda": 3_000_000}, {})
    assert f"<td>peak memory</td><td>{in_bytes(held)}</td>" in page
    assert "<td>peak GPU memory</td><td>3.0 MB</td>" in page


def test_shares_inputs_and_reasons_are_told(run):
    report = run[0].report
    text, page = report.to_text(), report_page("llama", report.to_dict(), {})
    shares = [f"{share:.1%} of " for share in (report.removed, report.sparsity)]

    assert report.removed == 1 - report.params_after / report.params_before < report.sparsity
    assert report.to_dict()["removed"] == report.removed
    assert report.inputs == "input_ids [3, 11]"
    for told in (text, page):
        assert "input_ids [3, 11]" in told and all(share in told for share in shares)
    assert f"{len(report.frozen)} groups were left alone: 2 head (not asked for), " in text
    assert ", 1 width (mixed by mean), " in text and "1 frozen (reaches the model's output)" in text
    assert "inspect MODEL --frozen" in text


def test_one_is_told_as_one(run):
    report = run[0].report
    one = dataclasses.replace(
        report, groups=report.groups[:1], frozen=report.frozen[:1], forward_passes=1.0
    )
    text = one.to_text()

    assert "1 group keeps " in text and "1 group was left alone" in text
    assert "1 forward pass, " in text


def test_the_words_tell_sizes_stages_and_what_they_cost(run):
    frozen = dataclasses.replace(run[0].report.frozen[0], kind="frozen", reason="an axis · node %x")
    report = dataclasses.replace(
        run[0].report,
        **{"params_before": 4000, "params_after": 3000, "sparsity": 0.3, "frozen": (frozen,)},
        **{"bytes_before": 16_000, "bytes_after": 12_000, "inputs": "[2, 3]"},
        **{"flops_before": 9000, "flops_after": 7000, "seconds": {"capture": 0.26, "couple": 1.0}},
        **{"verify_max_error": 1e-9, "forward_passes": 2.49605, "peak_memory": 2_000_000},
        **{"distances": (1.0, 0.5, 0.25)},
        groups=(dataclasses.replace(run[0].report.groups[0], units=8, kept=6, rotated=True),),
    )

    assert report.to_text().splitlines() == [
        "parameters 4,000 -> 3,000, 25.0% of all and 30.0% of those in scope removed",
        "weights 16.0 kB -> 12.0 kB",
        "FLOPs 9,000 -> 7,000 at [2, 3]",
        "1 group keeps 6 of 8 units, 1 of them in a basis of their own",
        "1 group was left alone: 1 frozen (an axis); fasp-graph inspect MODEL --frozen tells where",
        "verified to 1.0e-09, 2.5 forward passes, 1.3 s (capture 0.3, couple 1.0), "
        "2.0 MB of memory at most",
        "steps of all layers, distance from the dense outputs: 1 -> 0.5 -> 0.25",
    ]


def test_nothing_left_alone_has_no_reasons(run):
    text = dataclasses.replace(run[0].report, frozen=()).to_text()

    assert "\n0 groups were left alone\n" in text


def cells(page, heading):
    """The rows of the table under a heading, as text."""
    (table,) = re.findall(rf"<h2>{heading}</h2>.*?<table.*?</table>", page, re.S)
    rows = re.findall("<tr>(.*?)</tr>", table, re.S)
    return [[html.unescape(text) for text in re.findall("<t[hd][^>]*>(.*?)</t", r)] for r in rows]


def test_every_figure_stands_under_its_heading(run):
    report = run[0].report
    page = report_page("llama", report.to_dict(), {"latency_ms_before": 8.0, "latency_ms_after": 6})

    rows = {row[0]: row[1:] for row in cells(page, "Before and after")}
    assert rows[""] == ["before", "after", "change"]
    before, after = report.params_before, report.params_after
    assert rows["parameters"] == [f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}"]
    assert rows["latency ms"] == ["8.000", "6.000", "-25.0%"]
    assert rows["memory of the weights"][:2] == [
        f"{held / 1000:.1f} kB" for held in (report.bytes_before, report.bytes_after)
    ]
    seconds = {name: f"{held:.2f}" for name, held in report.seconds.items()}
    assert dict(cells(page, "Seconds")[1:]) == seconds and len(seconds) > 4
    heads, *groups = cells(page, "Groups")
    assert heads[2:6] == ["units", "kept", "error before repair", "error after repair"]
    for held, row in zip(report.groups, groups, strict=True):
        assert row[:4] == [held.name, held.kind, f"{held.units:,}", f"{held.kept:,}"]
        assert float(row[4].replace(",", "")) == pytest.approx(held.error_before, rel=1e-3)


def test_columns_without_a_figure_are_left_out(run):
    report = run[0].report.to_dict()
    scored = [{**group, "score_kept": 0.5} for group in report["groups"]]

    plain = cells(report_page("llama", report, {}), "Groups")[0]
    more = cells(report_page("llama", {**report, "groups": scored}, {}), "Groups")[0]

    assert set(more) - set(plain) == {"score kept"} and "error before repair" in plain


def test_layers_left_alone_for_one_reason_are_one_row(run):
    rows = cells(report_page("llama", run[0].report.to_dict(), {}), "Left alone, and why")

    name = "model.layers.{0,1}.self_attn.q_proj.0.blocks"
    assert [name, "head", "not asked for"] in rows and len(rows) < len(run[0].report.frozen) + 1


def test_the_heat_map_is_of_what_is_kept_and_darkest_where_all_is(run):
    names = ("net.0.up.0", "net.0.down.0", "net.1.up.0")
    kept = dict(zip(names, (8, 3, 1), strict=True))
    first = run[0].report.to_dict()["groups"][0]
    groups = [{**first, "name": name, "units": 8, "kept": kept[name]} for name in names]

    page = report_page("net", {**run[0].report.to_dict(), "groups": groups}, {})

    shown = cells(page, "Kept share of each group")
    assert shown == [["", "up", "down"], ["net.0", "100%", "38%"], ["net.1", "13%", ""]]
    light = [int(value) for value in re.findall(r"hsl\(188 55% (\d+)%\)", page)]
    assert light == [50, 76, 87]


def test_what_was_asked_for_is_told(run):
    asked = {"method": "best", "sparsity": 0.4, "seed": 0, "score": None, "kinds": ["chain"]}
    asked["versions"] = {"python": "3", "torch": "2"}

    page = report_page("llama", run[0].report.to_dict(), {}, asked)

    assert dict(cells(page, "Asked for")[1:]) == {
        **{"method": "best", "sparsity": "0.4", "seed": "0", "kinds": "chain"},
        "versions": "python 3, torch 2",
    }
    assert "native, the class's own code" in html.unescape(page) and "logarithmic scale" in page


@pytest.mark.parametrize(
    ("method", "min_keep"), [("best", 1), ("best", 30), ("flap", 1), ("flap", 30)]
)
def test_the_dot_is_where_the_plan_stopped_whatever_a_block_keeps(method, min_keep):
    entry, known = program("llama-random")
    config = fg.Config(sparsity=0.2, method=method, min_keep=min_keep)
    pruned = fg.prune(entry.model, entry.inputs, entry.calibration[:1], config, program=known)
    blocks = {group.name: group.blocks for group in pruned.deps.groups}

    for held in pruned.report.to_dict()["groups"]:
        if len(held["curve"]) > 1:
            gone = (held["units"] - held["kept"]) // blocks[held["name"]]
            assert stop_of(held) == gone


def test_without_curves_the_page_says_so_and_names_stay_data(run):
    report = run[0].report.to_dict()
    name = "<img src=x onerror=alert(1)>'"
    groups = [{**group, "name": name, "curve": ()} for group in report["groups"][:1]]
    page = report_page(name, {**report, "groups": groups}, {})
    with_curve = report_page(
        name, {**report, "notes": [name], "groups": [{**groups[0], "curve": (0.0, 1.0, 2.0)}]}, {}
    )

    assert "the allocation was uniform" in page
    for text in (page, with_curve):
        assert "<img" not in text and "<script" not in text
    assert "<p>&lt;img" in with_curve and "<p>&lt;img" not in page
    assert "aria-label='predicted error of &lt;img src=x onerror=alert(1)&gt;&#x27;" in with_curve


def test_sizes_are_those_of_the_graphs():
    entry, known = program("llama-random")
    config = fg.Config(method="magnitude")
    pruned = fg.prune(entry.model, entry.inputs, None, config, program=known)
    report, parameters = pruned.report, list(pruned.graph_module.parameters())
    assert report.params_after == sum(p.numel() for p in parameters) < report.params_before
    assert report.bytes_after == sum(p.nbytes for p in parameters) == 4 * report.params_after
    assert report.bytes_before == 4 * report.params_before
    assert report.flops_after < report.flops_before


def test_a_budget_that_one_unit_exceeds_is_told():
    model = torch.nn.Sequential(torch.nn.Linear(400, 2), torch.nn.ReLU(), torch.nn.Linear(2, 400))
    config = fg.Config(sparsity=0.1, method="magnitude")

    pruned = fg.prune(model, torch.randn(5, 400), None, config)

    assert pruned.plan.sparsity == 0
    assert "sparsity 0.000 was reached of 0.100" in pruned.report.notes[0]


def test_a_model_of_single_samples_is_pruned_by_the_default_method():
    model = torch.nn.Sequential(torch.nn.Linear(6, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3))
    samples = [torch.randn(6) for _ in range(12)]

    pruned = fg.prune(model, samples[0], samples, fg.Config(sparsity=0.3))

    assert pruned.model[0].out_features < 20
