"""Control flow as an op: taken apart where plain ops compute the same, else left with a reason."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.map import map as mapped
from torch._higher_order_ops.scan import scan
from torch.nn import functional as F

import fasp_graph
from fasp_graph import Config
from fasp_graph.prune import Program, read
from passes.capture import capture
from passes.control import STEPS
from passes.visit import op_name

Middle = Callable[["Block", Tensor, Tensor], Tensor]


class Block(nn.Module):
    """up -> what `middle` makes of it, with two layers and a predicate -> down."""

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self.middle = middle
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 3)
        self.left, self.right = nn.Linear(20, 20), nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, 6] to [B, T, 3]."""
        return self.down(self.middle(self, torch.relu(self.up(x)), x.sum() > 0))


def chosen(m: Block, h: Tensor, p: Tensor) -> Tensor:
    return torch.cond(p, lambda h: m.left(h).relu_(), lambda h: m.right(h).tanh(), (h,))


def chosen_pair(m: Block, h: Tensor, p: Tensor) -> Tensor:
    def layers(h: Tensor) -> tuple[Tensor, Tensor]:
        return m.left(h), m.right(h)

    left, right = torch.cond(p, layers, lambda h: (h * 2, h.relu()), (h,))
    return left * right


def chosen_twice(m: Block, h: Tensor, p: Tensor) -> Tensor:
    def outer(h: Tensor, p: Tensor) -> Tensor:
        return torch.cond(~p, lambda h: m.left(h), lambda h: m.right(h), (h,))

    return torch.cond(p, outer, lambda h, p: h * 2, (h, p))


def each(m: Block, h: Tensor, p: Tensor) -> Tensor:
    return mapped(lambda row: torch.tanh(m.left(row)), h)


def each_attending(m: Block, h: Tensor, p: Tensor) -> Tensor:
    def body(row: Tensor) -> Tensor:
        q, k = m.left(row)[None], m.right(row)[None]
        return F.scaled_dot_product_attention(q, k, row[None])[0]

    return mapped(body, h)


def each_in_a_branch(m: Block, h: Tensor, p: Tensor) -> Tensor:
    return torch.cond(p, lambda h: each(m, h, p), lambda h: m.right(h), (h,))


def steps(m: Block, h: Tensor, p: Tensor) -> Tensor:
    def step(carry: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        carry = torch.tanh(m.left(carry) + now)
        return carry, carry * 1.0

    return scan(step, torch.zeros_like(h[:, 0]), h, dim=1)[1]


def steps_back(m: Block, h: Tensor, p: Tensor) -> Tensor:
    def step(carry: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        carry = 0.5 * carry + m.left(now)
        return carry, carry * 2.0

    last, made = scan(step, torch.zeros_like(h[:, 0]), h, dim=1, reverse=True)
    return made + last[:, None]


def steps_that_choose(m: Block, h: Tensor, p: Tensor) -> Tensor:
    def step(carry: Tensor, now: Tensor) -> tuple[Tensor, Tensor]:
        carry = torch.cond(p, lambda c: m.left(c), lambda c: c * 0.5, (carry,)) + now
        return carry, carry * 1.0

    return scan(step, torch.zeros_like(h[:, 0]), h, dim=1)[1]


APART = [chosen, chosen_pair, chosen_twice, each, each_attending, each_in_a_branch]
APART += [steps, steps_back, steps_that_choose]


def block(middle: Middle) -> Block:
    torch.manual_seed(0)
    return Block(middle).double().eval().requires_grad_(False)


@functools.cache
def program(middle: Middle) -> Program:
    return read(block(middle), numbers())


def numbers(batch: int = 4, length: int = 5, sign: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, length, 6, generator=generator, dtype=torch.float64)
    return sign * (x if x.sum() > 0 else -x)


@pytest.mark.xdist_group("control")  # one capture for both
@pytest.mark.parametrize("middle", APART)
def test_what_is_inside_is_pruned(middle: Middle) -> None:
    config = Config(sparsity=0.4, method="magnitude", kinds=("chain", "bilinear"))
    known = program(middle)
    pruned = fasp_graph.prune(block(middle), numbers(), None, config, program=known)

    assert any(group.kept < group.units for group in pruned.report.groups)
    assert pruned.report.verify_max_error < 1e-9
    for sign in (1, -1):  # both ways of the predicate
        fresh = numbers(7, sign=sign)
        torch.testing.assert_close(pruned.model(fresh), pruned.graph_module(fresh))


@pytest.mark.xdist_group("control")
@pytest.mark.parametrize("middle", APART)
def test_the_graph_computes_what_the_model_does_both_ways(middle: Middle) -> None:
    model = block(middle)
    held = program(middle).captured.graph_module

    names = {op_name(node) for node in held.graph.nodes}
    assert not names & {"cond", "map_impl", "scan"}
    for sign in (1, -1):
        torch.testing.assert_close(held(numbers(3, 5, sign)), model(numbers(3, 5, sign)))


def draws(m: Block, h: Tensor, p: Tensor) -> Tensor:
    return torch.cond(h.sum() > 1e9, lambda h: F.dropout(h, 0.5, True), lambda h: h * 2, (h,))


def writes(m: Block, h: Tensor, p: Tensor) -> Tensor:
    return torch.cond(p, lambda h: h.view(-1).add_(1).view_as(h) * 1.0, lambda h: h * 2, (h,))


def shapes(m: Block, h: Tensor, p: Tensor) -> Tensor:
    made = torch.cond(p, lambda h: m.left(h)[:1], lambda h: h[:2], (h,))
    return made.sum(0, keepdim=True) + h


def size(m: Block, h: Tensor, p: Tensor) -> Tensor:
    return torch.cond(h.shape[0] > 3, lambda h: m.left(h), lambda h: h * 2, (h,))


def many(m: Block, h: Tensor, p: Tensor) -> Tensor:
    long = h[:, :1].expand(-1, STEPS + 1, -1)
    return steps(m, long, p)[:, : h.shape[1]]


def beyond(m: Block, h: Tensor, p: Tensor) -> Tensor:
    """The branch that is not taken reads what is not there."""
    places = torch.arange(99)
    return torch.cond(~p, lambda h: h[places][: len(h)] * 1.0, lambda h: h * 2, (h,))


WHOLE = {
    draws: "draws numbers",
    writes: "writes into what it is given",
    shapes: "other shapes",
    size: "a size decides",
    many: f"not a plain number up to {STEPS}",
    beyond: "taken apart it computes other numbers, or none",
}


@pytest.mark.parametrize("middle", WHOLE)
def test_what_plain_ops_do_not_repeat_stays_and_says_why(middle: Middle) -> None:
    deps = fasp_graph.analyze(block(middle), numbers())

    told = deps.explain("up.weight")
    assert "no axis rule for" in told and WHOLE[middle] in told
    assert "test_control.py" in told


def test_a_grouped_product_is_cut_in_rows_that_its_kernel_takes() -> None:
    class Routed(nn.Module):
        """Rows to the expert of their strongest logit, in bfloat16."""

        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(16, 4, bias=False)
            self.rise = nn.Parameter(torch.randn(4, 16, 32) / 4)
            self.fall = nn.Parameter(torch.randn(4, 32, 16) / 4)

        def forward(self, x: Tensor) -> Tensor:
            order = (expert := self.gate(x).argmax(-1)).argsort(stable=True)
            ends = (expert[:, None] == torch.arange(4)).sum(0).cumsum(0).to(torch.int32)
            h = torch._grouped_mm(x[order].bfloat16(), self.rise.bfloat16(), offs=ends)
            y = torch._grouped_mm(torch.relu(h), self.fall.bfloat16(), offs=ends).float()
            return torch.zeros_like(x).index_copy(0, order, y)

    torch.manual_seed(0)
    model, x = Routed().eval(), torch.randn(24, 16)
    config = Config(sparsity=0.3, method="magnitude", align=8)
    pruned = fasp_graph.prune(model, x, None, config)

    assert [(g.name, g.kept, g.units) for g in pruned.report.groups] == [("rise.2", 24, 32)]
    assert pruned.report.verify_max_error < 1e-9
    torch.testing.assert_close(pruned.model(x), pruned.graph_module(x))

    with pytest.raises(fasp_graph.FaspGraphError, match=r"rise\.2.* 16 bytes.* help: .*align=8"):
        fasp_graph.prune(model, x, None, Config(sparsity=0.3, method="magnitude"))


class Reader(nn.Module):
    """A gated recurrence over the words, by scan."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.value, self.gate, self.out = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(0, 1)

        def step(h: Tensor, now: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            h = now[1] * h + (1 - now[1]) * torch.tanh(now[0])
            return h, h.clone()

        given = (self.value(x), torch.sigmoid(self.gate(x)))
        return self.out(scan(step, given[0].new_zeros(given[0].shape[1:]), given)[1])


@pytest.mark.parametrize(("length", "kind"), [(7, "chain"), (70, "frozen")])
def test_words_are_counted_where_that_takes_a_scan_apart(length: int, kind: str) -> None:
    model = Reader().double().eval().requires_grad_(False)
    ids = torch.randint(11, (3, length))
    (given,) = capture(model, ids).graph_module.graph.find_nodes(op="placeholder")
    batch, words = given.meta["val"].shape

    assert fasp_graph.analyze(model, ids)["value.0"].kind == kind
    assert isinstance(batch, torch.SymInt) and isinstance(words, int) == (kind == "chain")
