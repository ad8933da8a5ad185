"""A budget in measured time: what is measured, how it is spent, what a run says of it. Times are
made up, or not compared.
"""

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from programs_of_zoo import program
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import fasp_graph as fg
from fasp_graph import pricing
from fasp_graph.commands.dryrun import dry_run
from fasp_graph.data import load_target
from fasp_graph.scale.streaming import prune_folder
from passes.allocate import _give_back, allocate_by_error
from passes.alone import timed
from passes.cost import Cost, Item, Lost, isotonic
from passes.errors import BudgetError, ConfigError
from passes.room import Room
from passes.select import Budget, allocate

STAIR = 8


def made_up(told):
    """Seconds of a call: the product of its weight's sizes, each up to the next multiple of STAIR;
    the weight is the last matrix that it reads.
    """
    matrices = [n.split(", ") for n in re.findall(r"float32 \[([\d, ]+)\]", told) if ", " in n]
    return math.prod(-(-int(size) // STAIR) * STAIR for size in matrices[-1])


@pytest.fixture
def clock(monkeypatch):
    """Calls take the seconds that `made_up` says; every one must run. What was measured."""
    asked = []

    def seconds(calls):
        pool = {}
        for call in calls.values():
            call.start(pool)()
        asked.append(sorted(calls))
        return {told: float(made_up(told)) for told in calls}

    monkeypatch.setattr(pricing, "seconds", seconds)
    return asked


def layers(count, width=32):
    torch.manual_seed(0)
    inner = [part for _ in range(count) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), *inner, nn.Linear(width, 4)).eval()


def batches(rows=20, width=6, count=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, width, generator=generator) for _ in range(count)]


def latency(**options):
    return fg.Config(**{"sparsity": 0.4, "method": "fasp", "budget": "latency", **options})


def test_the_nearest_sequence_that_does_not_fall():
    assert isotonic([1.0, 3.0, 2.0, 2.0, 5.0]) == pytest.approx([1, 7 / 3, 7 / 3, 7 / 3, 5])
    assert isotonic([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert isotonic([1.0, 2.0, 4.0]) == [1.0, 2.0, 4.0]


def test_a_count_that_measured_faster_than_a_smaller_one_is_taken_for_no_faster():
    times = {"four": 3.0, "eight": 2.0, "none": math.nan, "all": 5.0}

    lost = pricing._lost("a", (0, 1), {4: "four", 8: "eight", 10: "none", 12: "all"}, times)

    assert lost == Lost("a", (0, 1), (4, 8, 12), (0.5, 0.5, 0.0))


def test_groups_on_one_dim_add_up_and_on_several_multiply():
    first = Lost("a", (0, 0), (0, 10), (0.5, 0.0))
    others = (
        Lost("b", (0, 0), (0, 10), (0.5, 0.0)),
        Lost("c", (1, 0), (0, 5, 10), (1.0, 0.2, 0.0)),
    )
    cost = Cost((Item(8.0, (first, *others)), Item(2.0)), 10.0)

    assert cost.removed({"a": 10, "b": 10, "c": 10}) == 0
    assert cost.removed({"a": 5, "b": 0, "c": 10}) == pytest.approx(0.8 * 0.75)
    assert cost.removed({"a": 5, "b": 10, "c": 5}) == pytest.approx(0.8 * (1 - 0.75 * 0.8))


@pytest.mark.parametrize("more", [2, 9])
def test_equal_layers_share_their_measurements(clock, more):
    for count in (1, more):
        fg.prune(layers(count), batches()[0], batches(), latency())

    first, second = clock
    assert first == second  # the layers inside are cut at both ends
    assert len(first) == 3 * (pricing.POINTS - 1) + pricing.POINTS - 1 + 3


def test_ops_are_timed_at_the_sizes_of_the_first_batch_or_of_the_example(clock):
    model, example = layers(1), torch.randn(3, 6)

    fg.prune(model, example, batches(), latency())
    fg.prune(model, example, None, latency(method="magnitude"))

    with_data, without = ({re.search(r"float32 \[(\d+)", t)[1] for t in asked} for asked in clock)
    assert with_data == {"20"} and without == {"3"}


@pytest.mark.parametrize("name", ["llama-random", "gpt2", "mixtral", "resnet", "mobilenet"])
@pytest.mark.parametrize("kinds", [("chain", "head"), ("width",)])
def test_any_op_and_any_kind_of_group_is_timed(name, kinds, clock):
    entry, known = program(name)
    if not any(group.kind in kinds for group in known.deps.groups):
        pytest.skip("no such group")
    config = latency(sparsity=0.2, method="magnitude", kinds=kinds)

    report = fg.prune(entry.model, entry.inputs, None, config, program=known).report

    assert report.verify_max_error < 1e-6
    assert report.layer_seconds_after <= report.layer_seconds_before * 0.8 + 1e-6


def test_an_op_alone_has_the_sizes_that_a_cut_leaves():
    entry, known = program("llama-random")
    module, deps = known.captured.graph_module, known.deps
    group = next(g for g in deps.groups if g.kind == "chain" and g.blocks == 1)
    sheet = pricing._Sheet(timed(module, deps, known.captured.inputs, Room()))

    sheet.fill(known.captured, deps, [group], latency(align=8))

    cut = [
        (op, *point) for op, found in zip(sheet.ops, sheet.points, strict=True) for point in found
    ]
    assert {name for _, name, _, _ in cut} == {group.name} and len(cut) == 3  # gate, up, down
    for op, _, (dim, _), said in cut:
        for keep, told in said.items():
            made = sheet.calls[told].start({})()
            assert keep % 8 == 0
            assert f" [{keep}, " in told if dim == 0 else f", {keep}] " in told
            assert made.shape[-1] == (keep if dim == 0 else deps.parameters[op.weights[0]][0])


def budget_of(groups):
    return Budget({g.name: g.size for g in groups}, 0.0, 0.0, 1)


def chains(model):
    deps = fg.analyze(model, torch.randn(3, 7))
    return deps, [group for group in deps.groups if group.kind == "chain"]


def test_steps_are_given_back_dearest_first_until_none_can_be():
    asked = []

    def enough(chosen):
        assert len(asked) < 20, "the search does not end"
        asked.append(chosen)
        return sum(chosen.values()) >= 3

    errors = {"a": torch.tensor([0.0, 1.0, 9.0]), "b": torch.tensor([0.0, 2.0, 5.0])}
    saved = dict.fromkeys(errors, torch.tensor([0.0, 0.1, 0.2]))

    found = _give_back({"a": 2, "b": 2}, errors, saved, enough)

    assert found == {"a": 1, "b": 2}
    tried = [chosen for n, chosen in enumerate(asked) if chosen not in asked[:n]]
    assert tried == [found, {"a": 1, "b": 1}, {"a": 0, "b": 2}]


def test_no_more_goes_than_the_budget_asks_for(mlp):
    deps, groups = chains(mlp)
    curves = {g.name: [k**0.5 for k in range(g.size)] for g in groups}  # a price takes all or none
    lost = [Lost(g.name, (0, 0), (0, g.size), (1.0, 0.0)) for g in groups]
    cost = Cost(tuple(Item(1.0, (part,)) for part in lost), 2.0, measured=True)

    found = allocate_by_error(deps, groups, budget_of(groups), curves, 0.4, cost=cost)

    cut = [g.name for g in groups if found.keep[g.name] < g.size]
    assert cut and found.sparsity >= 0.4
    assert all(cost.removed({**found.keep, name: found.keep[name] + 1}) < 0.4 for name in cut)


@pytest.mark.parametrize("seed", range(6))
def test_the_allocation_is_the_best_of_all(mlp, seed):
    deps, groups = chains(mlp)
    draw = torch.Generator().manual_seed(seed)
    curves, items = {}, []
    for group in groups:
        rising = torch.rand(group.size, generator=draw).sort().values.cumsum(0)
        curves[group.name] = (0.0, *rising.tolist()[:-1])
        taken = torch.rand(group.size, generator=draw).sort().values.cumsum(0)
        shares = (*reversed((taken / taken[-1]).tolist()), 0.0)
        items.append(Item(1.0, (Lost(group.name, (0, 0), tuple(range(group.size + 1)), shares),)))
    cost = Cost(tuple(items), 2.0, measured=True)

    found = allocate_by_error(deps, groups, budget_of(groups), curves, 0.4, cost=cost)

    def error(keep):
        return sum(curves[g.name][g.size - keep[g.name]] for g in groups)

    every = (range(1, group.size + 1) for group in groups)
    choices = [dict(zip(found.keep, counts, strict=True)) for counts in itertools.product(*every)]
    best = min(error(k) for k in choices if cost.removed(k) >= found.sparsity)
    assert found.sparsity >= 0.4
    assert error(found.keep) == pytest.approx(best)


def test_counts_stand_at_the_edges_of_stairs(mlp):
    deps, groups = chains(mlp)
    curves = {g.name: [float(k * k) for k in range(g.size)] for g in groups}
    stairs = {g.name: tuple(-(-k // 4) * 4 / g.size for k in range(g.size + 1)) for g in groups}
    items = tuple(
        Item(1.0, (Lost(name, (0, 0), tuple(range(len(s))), tuple(1 - t for t in s)),))
        for name, s in stairs.items()
    )

    found = allocate_by_error(
        deps, groups, budget_of(groups), curves, 0.4, cost=Cost(items, 2.0, measured=True)
    )

    assert all(count % 4 == 0 for count in found.keep.values())
    assert 0.4 <= found.sparsity < 0.6


def test_one_ratio_for_all_meets_a_budget_in_time(mlp):
    deps, groups = chains(mlp)
    shares = (0.0,) * 4 + (1.0,)
    lost = {g.name: tuple(1 - s for s in shares) for g in groups}
    counts = {g.name: tuple(round(g.size * k / 4) for k in range(5)) for g in groups}
    items = tuple(Item(1.0, (Lost(n, (0, 0), counts[n], lost[n]),)) for n in lost)
    cost = Cost(items, 2.0, measured=True)

    budget = allocate(deps, groups, 0.3, cost=cost)

    assert 0.3 <= budget.sparsity < 0.6
    assert budget.sparsity == cost.removed(budget.keep)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "best"},
        {"allocation": "curves"},
        {"allocation": "influence"},
        {"allocation": "uniform"},
        {"method": "flap"},
        {"method": "magnitude", "align": 8},
    ],
    ids=str,
)
def test_every_allocation_keeps_within_the_time(options, clock):
    model, data = layers(2), batches(64, count=16)

    report = fg.prune(model, data[0][:3], data, latency(**options)).report

    before, after = report.layer_seconds_before, report.layer_seconds_after
    assert before == 32 * 8 + 2 * 32 * 32 + 8 * 32
    assert after <= before * 0.6 + 1e-6
    assert report.sparsity == pytest.approx(1 - report.params_after / report.params_before)
    assert "ms for one calibration batch" in report.to_text()
    assert json.loads(json.dumps(report.to_dict()))["layer_seconds_after"] == after


def test_a_budget_in_parameters_measures_nothing(clock):
    report = fg.prune(layers(1), batches()[0], batches(), fg.Config(method="fasp")).report

    assert not clock and report.layer_seconds_before is None
    assert "ms for" not in report.to_text()


def test_real_calls_are_timed_and_what_does_not_run_is_left_out():
    _, known = program("llama-random")
    ops = timed(known.captured.graph_module, known.deps, known.captured.inputs, Room())
    sheet = pricing._Sheet(ops[:2])
    sheet.fill(known.captured, known.deps, [], latency())

    def start(pool):
        raise RuntimeError("no such numbers")

    broken = replace(next(iter(sheet.calls.values())), told="broken", start=start)
    times = pricing.seconds({**sheet.calls, "broken": broken})

    assert all(times[told] > 0 for told in sheet.calls) and math.isnan(times["broken"])
    assert len(sheet.items(times)) == 2
    first = {**times, sheet.whole[0]: math.nan}
    assert len(sheet.items(first)) + len(sheet.untimed(first)) == 2
    assert sheet.untimed(first)[0] == ops[0].weights[0]


def test_what_could_not_be_timed_is_told(clock, monkeypatch):
    known = pricing.seconds
    entry = layers(1)

    def seconds(calls):
        found = known(calls)
        return {told: math.nan if "[4, 32]" in told else time for told, time in found.items()}

    monkeypatch.setattr(pricing, "seconds", seconds)
    report = fg.prune(entry, batches()[0], batches(), latency()).report

    assert any("1 op of the layers in scope did not run by itself" in n for n in report.notes)
    assert report.layer_seconds_before == 32 * 8 + 32 * 32


def test_what_cannot_be_had_is_refused(monkeypatch, clock):
    with pytest.raises(ConfigError, match="budget='watts' is unknown · help: one of parameters, l"):
        fg.Config(budget="watts")
    with pytest.raises(BudgetError, match=r"sparsity 0.99 of the measured time cannot.*help: ask"):
        fg.prune(layers(1), batches()[0], batches(), latency(sparsity=0.99))
    with pytest.raises(BudgetError, match="no group can be pruned"):
        fg.prune(nn.Linear(6, 2), batches()[0], batches(), latency())
    monkeypatch.setattr(pricing, "seconds", lambda calls: dict.fromkeys(calls, math.nan))
    with pytest.raises(BudgetError, match="can be timed by itself · help: budget='parameters'"):
        fg.prune(layers(1), batches()[0], batches(), latency())


def test_a_run_that_goes_on_goes_on_with_the_times_that_it_began_with(tmp_path, monkeypatch, clock):
    model, data, config = layers(2), batches(), latency()
    whole = fg.prune(model, data[0], data, config)
    finished = tmp_path / "work"

    def stop(stage, done, total):
        if list(finished.glob("*.safetensors")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fg.prune(model, data[0], data, config, stop, work=finished)
    monkeypatch.setattr(pricing, "seconds", lambda calls: pytest.fail("measured again"))
    resumed = fg.prune(model, data[0], data, config, work=finished)

    assert resumed.plan == whole.plan
    assert resumed.report.layer_seconds_after == whole.report.layer_seconds_after
    assert "times.json" in {path.name for path in finished.iterdir()}


def test_another_budget_is_another_run(tmp_path, clock):
    model, data = layers(2), batches()
    fg.prune(model, data[0], data, latency(), work=tmp_path / "work")

    fg.prune(model, data[0], data, latency(budget="parameters"), work=tmp_path / "work")

    assert "times.json" not in {path.name for path in (tmp_path / "work").iterdir()}


def test_the_first_process_measures_for_all(monkeypatch):
    calls = {"one": None, "other": None}
    monkeypatch.setattr(pricing, "seconds", lambda calls: {"one": 2.0, "other": math.nan})
    monkeypatch.setattr(pricing, "total", lambda mine: mine + torch.tensor([0.0, 0.0]))
    first = pricing._on_one_rank(calls)
    monkeypatch.setattr(pricing, "world", lambda: (1, 2))
    monkeypatch.setattr(pricing, "total", lambda mine: mine + torch.tensor([2.0, math.nan]))
    second = pricing._on_one_rank(calls)

    assert str(first) == str(second) == "{'one': 2.0, 'other': nan}"


def test_a_folder_too_large_for_memory_has_a_budget_in_time(tmp_path, clock):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "vocab_size": 50}
    OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=1, num_attention_heads=4)).save_pretrained(
        tmp_path / "dense"
    )
    ids = {"input_ids": torch.arange(33).view(3, 11) % 50}

    found = prune_folder(tmp_path / "dense", ids, [ids], latency(), tmp_path / "small")

    before, after = found.report.layer_seconds_before, found.report.layer_seconds_after
    assert after <= 0.6 * before + 1e-6


def test_the_command_line_measures_for_a_plan_too(run, clock):
    words = ("--budget", "latency", "--method", "magnitude", "--dry-run")
    code, told, _ = run("prune", "plain:several", *words)
    assert code == 0 and "a run measures it anew" in told and "uniform allocation" not in told

    code, out, _ = run("prune", "plain:several", *words, "--json")

    found = json.loads(out)
    assert code == 0 and len(clock) == 2
    assert not found["exact"] and 0 < found["sparsity"] < 1


def test_a_dry_run_counts_the_passes_of_the_run(clock):
    target = load_target("decoding:llama")
    config = latency()

    expected = dry_run(target, config).forward_passes
    pruned = fg.prune(target.model, target.inputs, target.calibration, config)

    assert expected == pruned.report.forward_passes == 1 + 1 / len(target.calibration)
