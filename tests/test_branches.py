"""Forwards that branch on numbers: where one way serves for both they are captured, where only one
was seen the graph asserts it, others are refused with their line.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, one_hot
from trial import zeroed

import fasp_graph as fg
from passes.branches import Assumed
from passes.capture import capture
from passes.errors import CalibrationError, CaptureError

WIDTH, EXPERTS = 8, 3


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x):
        return self.down(gelu(self.up(x)))


class Routed(nn.Module):
    """Two of three experts for each row; how they are visited is what the subclasses differ in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.router = nn.Linear(6, WIDTH), nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        h = self.embed(x)
        weight, index = (5 * self.router(h)).softmax(-1).topk(2)
        return self.head(h + self.mixed(h, weight, index))

    def mixed(self, h, weight, index):
        out = torch.zeros_like(h)
        for number, rows, share in self.visited(weight, index):
            out = out.index_add(0, rows, self.experts[number](h[rows]) * share)
        return out


class AnyBranch(Routed):
    def visited(self, weight, index):
        for number in range(EXPERTS):
            hit = (index == number).any(-1)
            if hit.any():
                yield number, hit.nonzero()[:, 0], weight[index == number][:, None]


class ItemBranch(Routed):
    def visited(self, weight, index):
        for number in range(EXPERTS):
            hit = (index == number).any(-1)
            if not hit.any().item():
                continue
            yield number, hit.nonzero()[:, 0], weight[index == number][:, None]


class CountBranch(Routed):
    def visited(self, weight, index):
        for number in range(EXPERTS):
            rows, place = torch.where(index == number)
            if (index == number).sum().item() == 0:
                continue
            yield number, rows, weight[rows, place, None]


class NumelBranch(Routed):
    def visited(self, weight, index):
        for number in range(EXPERTS):
            rows, place = torch.where(index == number)
            if self.empty(rows):
                continue
            yield number, rows, weight[rows, place, None]

    def empty(self, rows):
        return rows.numel() == 0


class LengthBranch(NumelBranch):
    def empty(self, rows):
        return len(rows) == 0


class HitOnly(Routed):
    def visited(self, weight, index):
        mask = one_hot(index, EXPERTS).permute(2, 1, 0)
        for number in (mask.sum((-1, -2)) > 0).nonzero():
            place, rows = torch.where(mask[number].squeeze(0))
            yield number, rows, weight[rows, place, None]


class HitAndSome(Routed):
    def visited(self, weight, index):
        mask = one_hot(index, EXPERTS).permute(2, 1, 0)
        for number in torch.nonzero(mask.sum((-1, -2)), as_tuple=False).squeeze(-1).tolist():
            place, rows = torch.where(mask[number])
            if rows.numel() == 0:
                continue
            yield number, rows, weight[rows, place, None]


STYLES = [AnyBranch, ItemBranch, CountBranch, NumelBranch, LengthBranch, HitOnly, HitAndSome]


def drawn(rows=9, seed=1):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("style", STYLES)
def test_experts_are_pruned_however_they_are_visited(style):
    model = style().double().eval()
    config = fg.Config(0.5, method="magnitude", kinds=("chain",), check=True)
    pruned = fg.prune(model, drawn(), None, config)
    assert len(pruned.plan.kept) == 1 + EXPERTS  # what the rows are, and what is inside the experts
    expected = zeroed(style().double().eval(), pruned.deps, pruned.plan.kept)
    for rows in (1, 2, 9, 40):  # a single row leaves an expert without work
        x = drawn(rows, seed=rows)
        torch.testing.assert_close(pruned.model(x), expected(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(pruned.graph_module(x), expected(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("style", [AnyBranch, HitAndSome])
def test_onnx_runtime_visits_them_too(style, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    x = drawn(40).float()
    pruned = fg.prune(style().eval(), x, [x], fg.Config(0.3))
    session = onnxruntime.InferenceSession(str(fg.export_onnx(pruned, tmp_path / "routed.onnx")))
    for rows in (1, 9):
        given = drawn(rows, seed=3).float()
        (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(found), pruned.model(given), rtol=1e-4, atol=1e-5
        )


class Guarded(nn.Module):
    """A repair that the example inputs never ask for."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.expert, self.head = Expert(), Expert()

    def forward(self, x):
        h = self.expert(x)
        if h.abs().amax() > 100:
            h = h.clamp(-100, 100)
        return self.head(x + h)


def test_the_way_that_was_seen_alone_is_asserted():
    x = torch.randn(4, WIDTH)
    pruned = fg.prune(Guarded().eval(), x, [x], fg.Config(0.5, check=True))
    assert pruned.plan.kept
    assert any("test_branches.py" in note for note in pruned.report.notes)
    large = 1e6 * x
    with pytest.raises(RuntimeError, match=r"one way .* test_branches.py:\d+, where it was False"):
        pruned.graph_module(large)
    expected = pruned.model.expert(large).clamp(-100, 100) + large
    torch.testing.assert_close(pruned.model(large), pruned.model.head(expected))
    with pytest.raises(CalibrationError, match="one way of a branch"):
        fg.prune(Guarded().eval(), x, [large], fg.Config(0.5, method="fasp"))


def signs():
    """Rows whose means are of both signs."""
    return torch.linspace(-1, 2, 4, dtype=torch.float64)[:, None].expand(4, WIDTH)


class Either(nn.Module):
    """Two ways that differ."""

    def __init__(self):
        super().__init__()
        self.left, self.right = Expert(), Expert()

    def forward(self, x):
        if x.mean() > 0:
            return self.left(x)
        return self.right(x)


class NotNothing(Routed):
    """Work that adds something where no row asks for it."""

    def mixed(self, h, weight, index):
        hit = (index[:, 0, None] == torch.arange(EXPERTS)).any(0)
        out = torch.zeros_like(h)
        for number in hit.nonzero()[:, 0]:
            out = out + self.experts[number](h)
        return out


class Calls(nn.Module):
    """A forward of its own around an expert."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.expert, self.router, self.call = Expert(), nn.Linear(WIDTH, 2, bias=False), forward
        self.tokens = nn.Embedding(20, WIDTH)

    def forward(self, x):
        return self.call(self, x)


def limited(m, x):
    h = m.expert(x)
    return h.clamp(max=3) if x.mean() > 0 else h


def few(m, x):
    rows = (m.router(x)[:, 0] > 0).nonzero()[:, 0]
    if rows.numel() < 2:
        return x
    return x.index_add(0, rows, m.expert(x[rows]))


def mean_of_four(m, x):
    rows = (m.router(x)[:, 0] > 0).nonzero()[:, 0]
    return x + m.expert(x[rows])[:4].sum(0) / max(1, min(4, len(rows)))


def first_of_all(m, x):
    place, start = torch.arange(len(x)), x.ne(0).nonzero()[0, 0]
    if int(start) > 0:
        place = (place - start).clamp(min=0)
    return m.expert(m.tokens(x) + m.tokens(place))


def until_small(m, x):
    h = x + m.expert(x)
    while h.abs().max() > 1:
        h = h / 2
    return h


LEFT = torch.tensor([0, 0, 3, 4, 5, 6, 7])
REFUSED = {
    "ways that differ": (Either(), signs()),
    "work on nothing": (NotNothing(), drawn()),
    "a limit that the example hardly reaches": (Calls(limited), 0.1 * signs()),
    "fewer than two": (Calls(few), drawn()[:, :1].expand(9, WIDTH) + signs()[:1, :1]),
    "a number of rows": (Calls(mean_of_four), torch.cat([drawn(), drawn(seed=2)], 1)[:, :WIDTH]),
    "the first that is chosen": (Calls(first_of_all), LEFT.flip(0)),
    "a loop on numbers": (Calls(until_small), drawn(5).repeat(1, 2)[:, :WIDTH]),
}


def test_a_loop_without_an_end_in_a_trace_is_refused():
    site = (("/home/me/mine.py", 12, 0),)
    trace = SimpleNamespace(_asked=Counter({site: 64}), watch=SimpleNamespace(most={site: 1}))

    with pytest.raises(CaptureError, match=r"for as long as numbers say at mine\.py:12 · help: "):
        Assumed._way(trace, torch.tensor(True), {True}, site)


@pytest.mark.parametrize("model, x", REFUSED.values(), ids=REFUSED)
def test_what_one_way_does_not_serve_for_is_refused(model, x):
    with pytest.raises(CaptureError, match=r"test_branches.py:\d+ in \w+"):
        capture(model.double().eval(), x)


def test_two_questions_of_one_line_are_two_places():
    def loud(m, x):
        h = m.expert(x)
        return h.clamp(max=50) if x.mean() > 0 and h.amax() > 50 else h

    model = Calls(loud).double().eval()
    graph = capture(model, signs()).graph_module
    torch.testing.assert_close(graph(-signs()), model(-signs()))
    with pytest.raises(RuntimeError, match="one way of a branch"):
        graph(1e4 * signs())


def test_the_report_names_the_lines_where_one_way_serves_for_both():
    x = drawn(40)
    pruned = fg.prune(NumelBranch().double().eval(), x, [x], fg.Config(0.3, method="fasp"))
    (note,) = [note for note in pruned.report.notes if "branches on numbers" in note]
    assert "test_branches.py" in note


class Eager(nn.Module):
    """Makes what it needs unless it is being compiled."""

    def __init__(self):
        super().__init__()
        self.expert = Expert()

    def forward(self, x, mask=None):
        if mask is None and not torch.compiler.is_compiling():
            mask = torch.ones(x.shape[:-1])
        return self.expert(x) * mask[..., None]


def test_what_is_done_outside_of_compilation_is_captured():
    x = torch.randn(4, 3, WIDTH)
    model = Eager().eval()
    torch.testing.assert_close(capture(model, x).graph_module(x), model(x))


class Halves(nn.Module):
    """As many positions as a mask selects, which are known to be half of all."""

    def __init__(self):
        super().__init__()
        self.embed, self.expert, self.head = nn.Linear(6, WIDTH), Expert(), nn.Linear(WIDTH, 3)

    def forward(self, x):
        h = self.expert(self.embed(x))
        score = h.sum(-1)
        upper = (score > score.median(1, keepdim=True).values).nonzero()[:, 1].view(len(x), -1)
        return self.head(h.gather(1, upper[..., None].expand(-1, -1, WIDTH)))


def test_selections_of_known_size_freeze_only_the_selected_axis():
    model = Halves().double().eval()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    pruned = fg.prune(model, x, None, fg.Config(0.5, method="magnitude", check=True))
    assert "expert.up.0" in pruned.plan.kept
