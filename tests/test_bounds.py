"""A graph refuses the sizes that it was not captured for, where the model computes otherwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from programs_of_zoo import program
from torch import Tensor, nn

import fasp_graph
from fasp_graph import Config
from passes.bounds import bounds
from passes.capture import capture


class Words(nn.Module):
    """Embeds ids; `way` changes the hidden units by their sizes."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.embedding = nn.Embedding(11, 6)
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.down(self.way(torch.relu(self.up(self.embedding(ids)))))


def longer(h: Tensor) -> Tensor:
    return h * h.shape[-1] ** -0.5 if h.shape[1] > 8 else h


def by_fours(h: Tensor) -> Tensor:
    return h if h.shape[1] % 4 else h.unflatten(1, (-1, 4)).flip(2).flatten(1, 2)


def alone(h: Tensor) -> Tensor:
    return h * 2 if h.shape[0] == 1 else h


def related(h: Tensor) -> Tensor:
    return h * 2 if h.shape[1] > 2 * h.shape[0] + 1 else h


def nothing(h: Tensor) -> Tensor:
    return h


CASES: dict[str, Any] = {  # way, example, what the graph says, sizes it takes, sizes it refuses
    "shorter": (longer, (3, 7), ["ids.shape[1] <= 8"], [(5, 8), (1, 2)], [(3, 9)]),
    "longer": (longer, (3, 12), None, [(2, 9), (1, 30)], [(3, 8)]),
    "by fours": (by_fours, (3, 8), ["ids.shape[1] % 4 == 0"], [(2, 16), (1, 8), (2, 4)], [(3, 9)]),
    "not alone": (alone, (3, 7), ["ids.shape[0] > 1"], [(2, 5)], [(1, 7)]),
    "by three": (
        lambda h: h * 2 if h.shape[1] % 3 else h,
        (3, 7),
        ["ids.shape[1] % 3 != 0"],
        [(1, 8)],
        [(3, 9)],
    ),
    "related": (related, (3, 7), None, [(4, 9), (9, 3)], [(3, 8)]),
    "nothing": (nothing, (3, 7), [], [(1, 1), (9, 30)], []),
}


def ids(*shape: int) -> Tensor:
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("case", CASES)
def test_a_graph_equals_the_model_or_refuses(case: str) -> None:
    way, example, said, taken, refused = CASES[case]
    model = Words(way).double().eval()
    graph = capture(model, ids(*example)).graph_module
    assert said is None or bounds(graph) == said
    for shape in taken:
        torch.testing.assert_close(graph(ids(*shape)), model(ids(*shape)))
    for shape in refused:
        with pytest.raises(RuntimeError, match="the graph was captured for ids.shape"):
            graph(ids(*shape))


def test_inputs_of_any_form_are_named() -> None:
    class Forms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, held: dict[str, Any], more: list[Tensor]) -> Tensor:
            x = held["x"][0] + more[0]
            return self.linear(x if x.shape[0] < 9 else -x)

    x = torch.randn(5, 4)
    graph = capture(Forms().eval(), ({"x": [x]}, [x + 1])).graph_module
    assert any(said.endswith(".shape[0] < 9") for said in bounds(graph))
    graph({"x": [x[:3]]}, [x[:3]])
    with pytest.raises(RuntimeError, match="captured for"):
        graph({"x": [x.repeat(2, 1)]}, [x.repeat(2, 1)])


@pytest.mark.xdist_group("t5")
def test_that_inputs_are_of_one_batch_needs_no_note() -> None:
    entry, known = program("t5")
    config = Config(method="magnitude")
    pruned = fasp_graph.prune(entry.model, entry.inputs, None, config, program=known)
    assert bounds(pruned.graph_module) == ["decoder_input_ids.shape[0] == input_ids.shape[0]"]
    assert not [note for note in pruned.report.notes if "shape" in note]


class Pictures(nn.Module):
    """The mean over places is divided by hand, or by torch."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.by_hand = by_hand
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv(x))
        places = h.shape[2] * h.shape[3]
        return self.out(h.sum((2, 3)) / places if self.by_hand else h.mean((2, 3)))


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_size_that_is_a_number_in_the_graph_is_asserted(by_hand: bool) -> None:
    model, other = Pictures(by_hand).double().eval(), torch.randn(5, 3, 12, 9).double()
    graph = capture(model, torch.randn(2, 3, 8, 6).double()).graph_module
    if by_hand:
        assert bounds(graph) == ["x.shape[2] == 8", "x.shape[3] == 6"]
        with pytest.raises(RuntimeError, match="captured for x.shape"):
            graph(other)
    else:
        torch.testing.assert_close(graph(other), model(other))


class Odd(nn.Module):
    """Convolutions of two strides; `way` looks at the size of the picture."""

    def __init__(self, way: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.way = way
        self.first, self.conv = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3, stride=2)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.way(self.conv(torch.relu(self.first(self.way(x))))).mean((2, 3)))


def where_it_is_larger(x: Tensor) -> Tensor:
    return x * 2 if x.shape[2] > 11 else x


def padded_to_fours(x: Tensor) -> Tensor:
    x = nn.functional.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4))
    return x * (1 + x.mean((2, 3), keepdim=True))


@pytest.mark.parametrize("way", [where_it_is_larger, padded_to_fours, nothing])
def test_pictures_of_any_size_are_computed_right_or_refused(way: Callable[..., Tensor]) -> None:
    model = Odd(way).double().eval()
    graph = capture(model, torch.randn(2, 3, 8, 8).double()).graph_module
    refused = 0
    for height, width in ((8, 8), (9, 13), (11, 8), (12, 16), (16, 9), (7, 7)):
        x = torch.randn(1, 3, height, width).double()
        try:
            found = graph(x)
        except RuntimeError as error:
            assert "the graph was captured for x.shape" in str(error)
            refused += 1
        else:
            torch.testing.assert_close(found, model(x))
    assert refused == (0 if way is nothing else 5)


def test_the_report_says_so_and_files_do_without(tmp_path: Path) -> None:
    model = Words(longer).eval()
    pruned = fasp_graph.prune(model, ids(3, 7), None, Config(method="magnitude", sparsity=0.4))
    assert any("the graph holds for ids.shape[1] <= 8" in note for note in pruned.report.notes)
    fasp_graph.export_onnx(pruned, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (given,) = session.get_inputs()
    (found,) = session.run(None, {given.name: ids(2, 8).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), pruned.graph_module(ids(2, 8)))
    fasp_graph.export(pruned, tmp_path / "model.pt2", format="pt2")
    held = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(held(ids(2, 8)), pruned.graph_module(ids(2, 8)))
    with pytest.raises((RuntimeError, AssertionError)):
        held(ids(2, 9))
