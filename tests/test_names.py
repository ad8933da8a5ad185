"""Layers that repeat are told once, in the terminal and in explanations; JSON tells all."""

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import fasp_graph as fg
from fasp_graph.commands.cells import broken
from fasp_graph.commands.listing import groups_table
from passes.names import folded, pattern, ranges

LAYERS = 12


@pytest.fixture(scope="module")
def deps():
    torch.manual_seed(0)
    layers = [
        nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(LAYERS)
    ]

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            for layer in self.layers:
                x = x + layer["down"](torch.relu(layer["up"](x)))
            return x

    return fg.analyze(Stack(), torch.randn(3, 6))


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a.0.w", "a.1.w", "a.2.w"], ["a.{0..2}.w"]),
        (["a.0.w", "b", "a.7.w"], ["a.{0,7}.w", "b"]),
        (["fc1.w", "fc2.w"], ["fc1.w", "fc2.w"]),
        (["a.0.e.0", "a.0.e.1", "a.1.e.0", "a.1.e.1"], ["a.{0,1}.e.{0,1}"]),
        (["a.9", "a.10", "a.9"], ["a.{9,10}"]),
        (["0.weight", "2.weight"], ["{0,2}.weight"]),
        (["a.0.e.1", "a.1.e.0"], ["a.0.e.1", "a.1.e.0"]),
        (["a.0.e.0", "a.0.e.1", "a.1.e.0"], ["a.0.e.{0,1}", "a.1.e.0"]),
        ([f"a.{n}.w" for n in (0, 1, 2, 4, 7, 8, 9)], ["a.{0..2,4,7..9}.w"]),
        ([f"a.{2 * n}.w" for n in range(20)], ["a.{0,2,4,6,…,38}.w"]),
        ([], []),
    ],
)
def test_names_that_differ_by_numbers_are_one(names, told):
    assert folded(names) == told
    assert {pattern(name) for name in names} >= {pattern(name) for name in names[:1]}


@pytest.mark.parametrize(
    ("positions", "told"),
    [
        ([[3], [0], [1]], "0-1, 3"),
        ([7], "7"),
        ([], ""),
        (range(0, 20, 2), "0, 2, 4, 6, 8, 10 and 4 more"),
    ],
)
def test_positions_are_ranges(positions, told):
    assert ranges(np.array(positions)) == told


def test_the_table_has_one_row_for_the_layers(deps):
    console, table = Console(width=200), groups_table("stack", deps, frozen=True)
    with console.capture() as said:
        console.print(table)
    words = said.get()

    assert table.row_count <= 3
    assert "layers.{0..11}.up.weight" in words and "layers.{0..11}.down.weight" in words
    assert sum(group["kind"] == "chain" for group in deps.to_dict()["groups"]) == LAYERS


@pytest.mark.parametrize(
    ("line", "width", "pieces"),
    [
        ("a.bcd.ef", 20, ["a.bcd.ef"]),
        ("a.bcd.ef", 5, ["a.bcd", ".ef"]),
        ("a.{0..2,7}.ef x", 4, ["a", ".{0..2,7}", ".ef", "x"]),
        ("mixed by mean · node", 8, ["mixed by", "mean ·", "node"]),
        ("longer.x", 3, ["longer", ".x"]),
        ("", 3, [""]),
    ],
)
def test_a_name_goes_on_before_a_dot(line, width, pieces):
    assert broken(line, width) == pieces


def test_no_part_of_a_name_is_broken_in_a_narrow_table(deps):
    console, table = Console(width=90), groups_table("stack", deps, frozen=True)
    with console.capture() as said:
        console.print(table)
    words = said.get().replace("│", " ").split()

    assert "layers.{0..11}.up.weight" not in words  # there is no room
    for part in ("layers", ".{0..11}.up", ".{0..11}.down", ".weight"):
        assert part in words


def test_on_a_narrow_terminal_names_are_whole_and_stand_below_each_other(deps):
    console, table = Console(width=60), groups_table("stack", deps, frozen=True, width=60)
    with console.capture() as said:
        console.print(table)
    words = said.get().replace("│", " ")

    assert "…" not in words and max(map(len, words.splitlines())) <= 60
    for name in ("group", "members", "consumers", "reason", "layers.{0..11}.up.weight"):
        assert name in words


def test_an_explanation_names_the_others_once(deps):
    words = deps.explain("layers.3.down.weight")

    assert "\n" + " " * 25 + "layers.{0..2,4..11}.down.weight[0] 0-5\n" in words
    assert "layers.4.down.weight" not in words and len(words) < 1000
