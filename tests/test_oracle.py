"""Every axis rule against the laws that define its kinds, by deleting indices before and after the
op. A row: op, arguments as a function of random tensors, their axes, the rule expected.
"""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import fasp_graph as fg
from passes import rules
from passes.capture import capture
from passes.errors import FaspGraphError
from passes.rules.laws import observed
from passes.visit import bind, op_name

aten = torch.ops.aten
SIZES = {"b": 3, "t": 5, "i": 6, "o": 7, "h": 4, "d": 8, "s": 9, "v": 10, "c": 6, "x": 11, "y": 12}
SIZES |= {"k": 3, "l": 3, "n": 4, "p": 5, "q": 6, "j": 5, "z": 2, "r": 4, "w": 13, "g": 5, "u": 7}


def ids(high, *shape):
    """Positions below `high`, without a generator: torch 2.11 cannot capture one."""
    return (torch.arange(math.prod(shape)) * 7 % high).reshape(shape)


def _half(x, n):
    return [size // 2 for size in x.shape[-n:]]


def grouped(x, w, ends):
    """Of whole numbers, which bfloat16 holds, in rows of 16 bytes, which the kernel wants."""
    wide = w.shape[-1]
    x, w = (F.pad(t.round(), (0, 16 - t.shape[-1])).bfloat16() for t in (x, w))
    w = F.pad(w, (0, 0, 0, 16 - w.shape[-2]))
    offs = torch.tensor(ends, dtype=torch.int32) if ends else None
    return torch._grouped_mm(x, w, offs=offs)[..., :wide].double()


# op, shapes of the tensors by axis, call on the tensors, rule
ROWS = [
    ("linear", "b t i, o i, o", lambda x, w, b: F.linear(x, w, b), "b t i, o i, o -> b t o"),
    ("addmm", "o, n i, i o", torch.addmm, "o, n i, i o -> n o"),
    ("addmm", "n o, n i, i o", torch.addmm, "n o, n i, i o -> n o"),
    ("addmv", "n, n i, i", torch.addmv, "n, n i, i -> n"),
    ("mm", "n i, i o", torch.mm, "n i, i o -> n o"),
    ("mv", "n i, i", torch.mv, "n i, i -> n"),
    ("dot", "i, i", torch.dot, "i, i -> "),
    ("vdot", "i, i", torch.vdot, "i, i -> "),
    ("bmm", "b n i, b i o", torch.bmm, "b n i, b i o -> b n o"),
    ("baddbmm", "b n o, b n i, b i o", torch.baddbmm, "b n o, b n i, b i o -> b n o"),
    ("baddbmm", "o, b n i, b i o", torch.baddbmm, "o, b n i, b i o -> b n o"),
    ("matmul", "b h t i, b h i o", torch.matmul, "b h t i, b h i o -> b h t o"),
    ("matmul", "i, b i o", torch.matmul, "i, b i o -> b o"),
    ("matmul", "b t i, i", torch.matmul, "b t i, i -> b t"),
    ("matmul", "i, i", torch.matmul, "i, i -> "),
    (
        "einsum",
        "b t h d, b s h d",
        lambda q, k: torch.einsum("bthd,bshd->bhts", q, k),
        "b t h d, b s h d -> b h t s",
    ),
    (
        "einsum",
        "b t i, i o",
        lambda x, w: torch.einsum("...i,io->...o", x, w),
        "b t i, i o -> b t o",
    ),
    (
        "_grouped_mm",
        "t i, h i o",
        lambda x, w: grouped(x, w, [1, 2, 2, 5]),
        "t i, h i o -> t o; fixed t h",
    ),
    (
        "_grouped_mm",
        "h t i, i u",
        lambda x, w: grouped(x, w, [1, 2, 2, 7]),
        "h t i, i u -> t u; fixed h u",
    ),
    ("_grouped_mm", "t i, i o", lambda x, w: grouped(x, w, [2, 6]), "t i, i o -> z t o; fixed i"),
    ("_grouped_mm", "h t i, h i o", lambda x, w: grouped(x, w, []), "h t i, h i o -> h t o"),
    ("bilinear", "b i, b j, o i j, o", F.bilinear, "b i, b j, o i j, o -> b o"),
    ("outer", "n, o", torch.outer, "n, o -> n o"),
    (
        "scaled_dot_product_attention",
        "b h t d, b h s d, b h s v, t s",
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.3),
        "b h t d, b h s d, b h s v, t s -> b h t v; mixed s",
    ),
    (
        "scaled_dot_product_attention",
        "b h t d, b h s d, b h s v, b h t s",
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.3),
        "b h t d, b h s d, b h s v, b h t s -> b h t v; mixed s",
    ),
    ("conv1d", "b i x, o i k, o", F.conv1d, "b i x, o i k, o -> b o X; fixed x k"),
    ("conv2d", "b i x y, o i k l, o", F.conv2d, "b i x y, o i k l, o -> b o X Y; fixed x y k l"),
    (
        "conv3d",
        "b i x y w, o i k l r",
        F.conv3d,
        "b i x y w, o i k l r -> b o X Y W; fixed x y w k l r",
    ),
    (
        "conv2d",
        "b i x y, o i",
        lambda x, w: F.conv2d(x, w[:, :, None, None]),
        "b i x y, o i -> b o x y",
    ),
    (
        "conv1d",
        "b i x, o i",
        lambda x, w: F.conv1d(x, w[:, :, None], stride=2),
        "b i x, o i -> b o X; fixed x",
    ),
    (
        "conv_transpose1d",
        "b i x, i o",
        lambda x, w: F.conv_transpose1d(x, w[:, :, None], output_padding=1, dilation=2),
        "b i x, i o -> b o X; fixed x",
    ),
    ("prelu", "b c x, c", F.prelu, "b c x, c -> b c x"),
    ("prelu", "b c", lambda x: F.prelu(x, x.new_full((1,), 0.3)), "b c -> b c"),
    (
        "_weight_norm",
        "o i",
        lambda v: torch._weight_norm(v, v.new_ones(v.shape[0], 1), 0),
        "o i -> o i; mixed i",
    ),
    ("convolution", "b i x y, o i k l", F.conv2d, "b i x y, o i k l -> b o X Y; fixed x y k l"),
    ("conv_transpose1d", "b i x, i o k", F.conv_transpose1d, "b i x, i o k -> b o X; fixed x k"),
    (
        "conv_transpose2d",
        "b i x y, i o k l",
        F.conv_transpose2d,
        "b i x y, i o k l -> b o X Y; fixed x y k l",
    ),
    (
        "conv_transpose3d",
        "b i x y w, i o k l r",
        F.conv_transpose3d,
        "b i x y w, i o k l r -> b o X Y W; fixed x y w k l r",
    ),
    (
        "layer_norm",
        "b t c, c, c",
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        "b t c, c, c -> b t c; mixed c",
    ),
    (
        "rms_norm",
        "b t c, c",
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-30),  # the edit turns epsilon as well
        "b t c, c -> b t c; mean c",
    ),
    (
        "batch_norm",
        "b c x y, c, c, c, c",
        lambda x, m, v, w, b: F.batch_norm(x, m, v.abs() + 1, w, b),
        "b c x y, c, c, c, c -> b c x y",
    ),
    (
        "group_norm",
        "b c x, c, c",
        lambda x, w, b: F.group_norm(x, 1, w, b),
        "b c x, c, c -> b c x; mixed c x",
    ),
    (
        "instance_norm",
        "b c x",
        lambda x: F.instance_norm(x),
        "b c x -> b c x; mixed x",
    ),
    *(
        (name, "b t s", lambda x, f=f: f(x, -1), "b t s -> b t s; mixed s")
        for name, f in {
            "softmax": torch.softmax,
            "_softmax": torch.softmax,
            "log_softmax": torch.log_softmax,
            "_log_softmax": torch.log_softmax,
        }.items()
    ),
    ("embedding", "v c", lambda w: F.embedding(ids(10, 3, 5), w), "v c -> b t c; fixed v"),
    (
        "gather",
        "v c",
        lambda x: torch.gather(x, 0, ids(10, 5, 1).expand(-1, x.shape[1])),
        "v c -> t c; fixed v",
    ),
    *(
        (
            name,
            "v c, t c",
            lambda x, y, f=f: f(x, 0, ids(10, 5, 1).expand(-1, x.shape[1]), y),
            "v c, t c -> v c; fixed v t",
        )
        for name, f in {
            "scatter": torch.scatter,
            "scatter_add": torch.scatter_add,
            "scatter_reduce": lambda x, d, i, y: torch.scatter_reduce(x, d, i, y, "amax"),
        }.items()
    ),
    *(
        (
            name,
            "v c, t c",
            lambda x, y, f=f: f(x, 0, torch.tensor([9, 0, 5, 2, 7]), y),
            "v c, t c -> v c; fixed v t",
        )
        for name, f in {"index_add": torch.index_add, "index_copy": torch.index_copy}.items()
    ),
    *(
        (name, "b t", lambda x, f=f: f(x, 1), "b t -> b t; mixed t")
        for name, f in {
            "cumsum": torch.cumsum,
            "cumprod": torch.cumprod,
            "logcumsumexp": torch.logcumsumexp,
            "argsort": lambda x, d: torch.argsort(x, d).double(),
        }.items()
    ),
    *(
        (name, "b t", lambda x, f=f: f(x, 1)[0], "b t -> b t; mixed t")
        for name, f in {"cummax": torch.cummax, "cummin": torch.cummin, "sort": torch.sort}.items()
    ),
    (
        "repeat_interleave",
        "v c",
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 0, 1, 3, 1, 1, 2, 1, 1])[: len(x)], 0),
        "v c -> t c; fixed v",
    ),
    ("topk", "b t", lambda x: torch.topk(x, 2, 1)[0], "b t -> b z; mixed t"),
    *(
        (name, "b t c", lambda x, f=f: f(x), "b t c -> b c; mixed t")
        for name, f in {
            "amax": lambda x: x.amax(1),
            "amin": lambda x: x.amin(1),
            "argmax": lambda x: x.argmax(1).double(),
            "argmin": lambda x: x.argmin(1).double(),
            "prod": lambda x: x.prod(1),
            "var": lambda x: x.var(1),
            "std": lambda x: x.std(1),
            "logsumexp": lambda x: x.logsumexp(1),
            "max": lambda x: x.max(1)[0],
            "min": lambda x: x.min(1)[0],
            "var_mean": lambda x: torch.var_mean(x, 1)[0],
            "std_mean": lambda x: torch.std_mean(x, 1)[0],
            "all": lambda x: x.all(1).double(),
            "median": lambda x: x.median(1)[0],
            "nanmedian": lambda x: x.nanmedian(1)[0],
            "mode": lambda x: x.mode(1)[0],
            "kthvalue": lambda x: x.kthvalue(2, 1)[0],
        }.items()
    ),
    ("mean", "b t c", lambda x: x.mean(1), "b t c -> b c; mean t"),
    ("sum", "b t c", lambda x: x.sum(1), "b t c -> b c"),
    ("any", "b t c", lambda x: x.any(1).double(), "b t c -> b c"),
    ("count_nonzero", "b t c", lambda x: x.count_nonzero(1).double(), "b t c -> b c"),
    ("_cdist_forward", "b p c, b q c", torch.cdist, "b p c, b q c -> b p q; mixed c"),
    *(
        (name, "b t c", lambda x, f=f: f(x), "b t c -> b c")
        for name, f in {
            "norm": lambda x: aten.norm.ScalarOpt_dim(x, 2, [1]),
            "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1),
        }.items()
    ),
    *(
        (f"{name}{n}d", f"b c {' '.join('xyw'[:n])}", f, None)
        for n in (1, 2, 3)
        for name, f in {
            "max_pool": lambda x, n=n: getattr(F, f"max_pool{n}d")(x, 2),
            "avg_pool": lambda x, n=n: getattr(F, f"avg_pool{n}d")(x, 2),
            "adaptive_avg_pool": lambda x, n=n: getattr(F, f"adaptive_avg_pool{n}d")(
                x, _half(x, n)
            ),
            "adaptive_max_pool": lambda x, n=n: getattr(F, f"adaptive_max_pool{n}d")(
                x, _half(x, n)
            ),
            "upsample_nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        }.items()
    ),
    *(
        (
            f"_upsample_nearest_exact{n}d",
            f"b c {' '.join('xy'[:n])}",
            lambda x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
            None,
        )
        for n in (1, 2)
    ),
    (
        "max_pool2d_with_indices",
        "b c x y",
        lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
        None,
    ),
    (
        "upsample_linear1d",
        "b c x",
        lambda x: F.interpolate(x, scale_factor=2, mode="linear"),
        None,
    ),
    *(
        (f"upsample_{mode}2d", "b c x y", lambda x, m=mode: F.interpolate(x, (9, 9), mode=m), None)
        for mode in ("bilinear", "bicubic")
    ),
    *(
        (
            f"_upsample_{mode}2d_aa",
            "b c x y",
            lambda x, m=mode: F.interpolate(x, (9, 9), mode=m, antialias=True),
            None,
        )
        for mode in ("bilinear", "bicubic")
    ),
    (
        "upsample_trilinear3d",
        "b c x y w",
        lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"),
        None,
    ),
    (
        "grid_sampler",
        "b c x y, b p q z",
        lambda x, g: F.grid_sample(x, g, align_corners=False),
        "b c x y, b p q z -> b c p q; fixed x y z",
    ),
    *(
        (name, "b t c", lambda x, f=f: f(x, dim=1), "b t c -> b t c; mixed t")
        for name, f in {"fft_fft": torch.fft.fft, "fft_ifft": torch.fft.ifft}.items()
    ),
    *(
        (name, "b t c", lambda x, f=f: f(x, dim=1), "b t c -> b T c; mixed t")
        for name, f in {
            "fft_rfft": torch.fft.rfft,
            "fft_irfft": torch.fft.irfft,
            "fft_hfft": torch.fft.hfft,
            "fft_ihfft": torch.fft.ihfft,
        }.items()
    ),
    *(
        (name, "b t c", lambda x, f=f: f(x, dim=(1, 2)), "b t c -> b t c; mixed t c")
        for name, f in {
            "fft_fft2": torch.fft.fft2,
            "fft_ifft2": torch.fft.ifft2,
            "fft_fftn": torch.fft.fftn,
            "fft_ifftn": torch.fft.ifftn,
        }.items()
    ),
    *(
        (name, "b t c", lambda x, f=f: f(x, dim=(1, 2)), "b t c -> b t C; mixed t c")
        for name, f in {
            "fft_rfft2": torch.fft.rfft2,
            "fft_irfft2": torch.fft.irfft2,
            "fft_rfftn": torch.fft.rfftn,
            "fft_irfftn": torch.fft.irfftn,
        }.items()
    ),
]
SPATIAL = set("xywklrXYW")


def tensors(shapes):
    generator = torch.Generator().manual_seed(0)
    sizes = [[SIZES[axis] for axis in side.split()] for side in shapes.split(",")]
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


@pytest.mark.parametrize(("name", "shapes", "call", "rule"), ROWS)
def test_observed_kinds_are_the_declared_ones(name, shapes, call, rule):
    operands = [tuple(side.split()) for side in shapes.split(",")]
    space = " ".join(axis for axis in operands[0] if axis in SPATIAL)
    rule = rule or f"{shapes} -> b c {space.upper()}; fixed {space}"
    declared = rules.parse(rule)
    carried = {axis for names in declared.outputs for axis in names}

    for axis in dict.fromkeys(axis for names in operands for axis in names):
        kind = declared.kind(axis, axis in carried)
        found = observed(call, tensors(shapes), operands, declared.outputs, axis)
        if kind == "fixed":
            assert found in ("fixed", "mixed"), (axis, found)
        else:
            assert found == kind, (axis, found)


class Model(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *args):
        return self.call(*args)


# Ops that torch.export writes in another form, and a rule more careful than the op.
REWRITTEN = {"_softmax", "_log_softmax", "convolution"}
CAREFUL = {("any", "mixed", "sum")}


@pytest.mark.parametrize(("name", "shapes", "call", "rule"), ROWS)
def test_the_table_declares_what_the_row_expects(name, shapes, call, rule):
    program = capture(Model(call), tuple(tensors(shapes)))
    nodes = {op_name(n): n for n in program.graph_module.graph.nodes if n.op == "call_function"}
    if name in REWRITTEN:
        assert name not in nodes
        return
    given = bind(nodes[name], nodes[name].args, nodes[name].kwargs)
    shaped = torch.fx.map_arg(given, lambda n: tuple(n.meta["val"].shape))
    found = rules.table()[name]
    found = rules.parse(found if isinstance(found, str) else found(rules.Call(shaped)))
    space = " ".join(axis for axis in shapes.split(",")[0].split() if axis in SPATIAL)
    declared = rules.parse(rule or f"{shapes} -> b c {space.upper()}; fixed {space}")
    operands = list(zip(declared.operands, found.operands, strict=False))
    if name != "prelu":  # of others the first operand names all axes
        operands = operands[:1]
    pairs = [zip(reversed(mine), reversed(names), strict=False) for mine, names in operands]
    for axis, theirs in itertools.chain(*pairs):
        if theirs == "...":
            continue
        wanted = declared.kind(axis, any(axis in out for out in declared.outputs))
        kind = found.kind(theirs, any(theirs in out for out in found.outputs))
        both_hold_still = {wanted, kind} <= {"mixed", "fixed"}
        assert kind == wanted or both_hold_still or (name, kind, wanted) in CAREFUL, axis


def test_every_rule_has_a_row():
    assert set(rules.table()) - set(rules.CUSTOM) <= {row[0] for row in ROWS}


def test_no_row_without_a_rule():
    assert {row[0] for row in ROWS} <= set(rules.table())


@torch.library.custom_op("fasp_test::scaled_mix", mutates_args=())
def scaled_mix(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """[n, i], [o, i], [i] -> [n, o]: a linear layer with a scale per input channel."""
    return (x * scale) @ w.T


@scaled_mix.register_fake
def _(x, w, scale):
    return x.new_empty(x.shape[0], w.shape[0])


class Custom(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(5, 12)
        self.down = torch.nn.Parameter(torch.randn(4, 12))
        self.scale = torch.nn.Parameter(torch.rand(12) + 0.5)

    def forward(self, x):
        return scaled_mix(torch.relu(self.up(x)), self.down, self.scale)


def test_a_custom_op_is_probed_registered_and_pruned():
    torch.manual_seed(0)
    model, x = Custom(), torch.randn(3, 5)
    frozen = fg.analyze(model, x)
    assert not [g for g in frozen.groups if g.kind == "chain"]
    assert "fasp_test" in frozen.explain("up.weight") and "test_oracle.py" in frozen.explain(
        "scale"
    )

    rule = rules.probe(scaled_mix, (torch.randn(3, 6), torch.randn(7, 6), torch.randn(6)))
    assert rule == "a b, c b, b -> a c"
    rules.register("fasp_test.scaled_mix", rule)
    try:
        config = fg.Config(sparsity=0.4, method="magnitude")
        pruned = fg.prune(model, x, None, config)
    finally:
        rules.CUSTOM.clear()
    assert pruned.report.params_after < pruned.report.params_before
    assert pruned.report.verify_max_error < 1e-9


@torch.library.custom_op("fasp_test::running", mutates_args=())
def running(x: torch.Tensor) -> torch.Tensor:
    """[n, i] -> [n, i]: the running sum along i."""
    return x.cumsum(-1)


@running.register_fake
def _(x):
    return torch.empty_like(x)


class Running(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 20), torch.nn.Linear(20, 3)

    def forward(self, x):
        return self.down(running(self.up(x)))


def test_a_wrong_rule_is_told_to_whoever_registered_it(monkeypatch):
    model, config = Running().eval(), fg.Config(sparsity=0.4, method="magnitude")
    monkeypatch.setitem(rules.CUSTOM, "fasp_test.running", "... c -> ... c")

    words = "differ by .* help: the rule that was registered for fasp_test.running may be wrong"
    with pytest.raises(FaspGraphError, match=words) as caught:
        fg.prune(model, torch.randn(4, 6), None, config)
    assert "a bug of fasp_graph" not in str(caught.value)


@pytest.mark.parametrize("rule", ["a b c -> a b c", "c -> c", "a c -> a c d", "a c -> c"])
def test_a_rule_of_other_axes_than_the_tensors_have_is_refused(rule, monkeypatch):
    monkeypatch.setitem(rules.CUSTOM, "fasp_test.running", rule)

    words = (
        r"registered for fasp_test.running names the axes .* \[4, 20\] · node .* · help: one name"
    )
    with pytest.raises(FaspGraphError, match=words):
        fg.analyze(Running().eval(), torch.randn(4, 6))


def test_probe_refuses_a_sample_that_names_no_axes():
    with pytest.raises(FaspGraphError, match="size of its own"):
        rules.probe(torch.mm, (torch.randn(5, 5), torch.randn(5, 5)))


def test_probe_finds_mixed_and_fixed_axes():
    assert (
        rules.probe(lambda x: torch.softmax(x, -1), (torch.randn(3, 5),)) == "a b -> a b; mixed b"
    )
    index = torch.tensor([[0, 4, 2], [1, 3, 0], [0, 1, 4], [2, 2, 2]])
    assert rules.probe(lambda w: w[index], (torch.randn(5, 6),)).endswith("fixed a")
