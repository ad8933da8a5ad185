"""A walk on other devices than the model's: the plan and weights of one on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fasp_graph as fg
from fasp_graph.prune import read
from passes.errors import ConfigError
from passes.placement import spread
from passes.rewrite import attribute
from tests.on_devices import CASES, ids, llama


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    command = [sys.executable, "-W", "ignore", "-m", "tests.on_devices"]
    done = subprocess.run(
        [*command, str(tmp_path_factory.mktemp("devices"))],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*CASES, "experts", "convolutions", "writes"])
def test_on_several_devices_it_is_what_it_is_on_one(seen, case):
    found = seen[case]
    assert found["same"] and found["apart"] < (1e-4 if case == "experts" else 1e-9)  # float32
    assert found["on"] == ["cpu"]
    asked = CASES.get(case, {}).get("compute_on", ("side:0", "side:1"))
    busy = {place: n for place, n in found["calls"].items() if place.startswith("side")}
    assert set(busy) == set(asked) and min(busy.values()) > max(busy.values()) / 8


def test_values_beyond_max_memory_go_to_the_host_and_come_back(seen):
    assert seen["spilled"]["to host"] > seen["residual"]["to host"] + 10


def test_a_model_on_a_device_holds_its_values_there_within_max_memory(seen):
    found = seen["bounded"]
    assert found["stops"] > 10 and found["apart"] < 1e-4
    assert 0 < found["most"] <= found["budget"]


def test_a_folder_is_streamed_to_devices(seen):
    assert seen["streamed"]["same"] and seen["streamed"]["apart"] < 1e-4
    assert {"side:0", "side:1"} <= set(seen["streamed"]["on"])


def test_the_graph_is_spread_in_order_by_bytes_of_weights():
    graph = read(llama(), ids()[0]).captured.graph_module
    devices = [torch.device("cuda", number) for number in range(3)]
    places = spread(graph, devices)
    order = [places[node].index for node in graph.graph.nodes if node.op == "call_function"]
    assert order == sorted(order) and set(order) == {0, 1, 2}
    held = dict.fromkeys(devices, 0)
    counted = set()
    for node in graph.graph.nodes:
        for arg in node.all_input_nodes:
            if arg.op == "get_attr" and arg.target not in counted:
                counted.add(arg.target)
                held[places[node]] += attribute(graph, arg.target).nbytes
    assert max(held.values()) < 1.5 * min(held.values())
    assert spread(graph, []) == {}


def test_a_weight_that_is_used_again_counts_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.long, self.next = nn.Linear(9, 9, bias=False), nn.Linear(9, 9, bias=False)

        def forward(self, x):
            for _ in range(3):
                x = torch.relu(self.long(x))
            return self.next(x)

    graph = read(Twice().eval(), torch.randn(2, 9)).captured.graph_module
    places = spread(graph, [torch.device("cuda", number) for number in range(2)])
    products = [place.index for node, place in places.items() if "linear" in node.name]
    assert products == [0, 0, 0, 1] or products == [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "allocation=sensitivity"),
        ({"allocation": "uniform"}, "restore=outputs"),
        ({"method": "fasp", "score": "taylor"}, "score=taylor"),
        ({"method": "fasp", "budget": "latency"}, "budget=latency"),
        ({"method": "fasp", "compute_on": ("gpu",)}, "device 'gpu'"),
        ({"method": "fasp", "compute_on": ("meta",)}, "'meta'"),
    ],
)
def test_what_cannot_be_done_on_devices_is_refused_first(options, word):
    with pytest.raises(ConfigError, match=word) as error:
        fg.prune(llama(), ids()[0], None, fg.Config(**{"compute_on": ("cpu",), **options}))
    assert "help:" in str(error.value)


def test_processes_do_not_share_devices(monkeypatch):
    monkeypatch.setattr("fasp_graph.inputs.world", lambda: (0, 2))
    config = fg.Config(method="fasp", compute_on=("cuda:0", "cuda:1"))
    with pytest.raises(ConfigError, match="each of 2 processes · help: compute_on="):
        fg.prune(llama(), ids()[0], None, config)
