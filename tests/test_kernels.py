"""Padding V keeps every number, and `narrow` takes it away again."""

import operator
from types import SimpleNamespace

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fasp_graph import Config, prune
from passes.kernels import narrow, told_causal, widen
from passes.select import _count, _step

attention = torch.ops.aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(24, 24) for _ in range(3))
        self.out = nn.Linear(24, 24)

    def forward(self, x):
        q, k, v = (w(x).unflatten(-1, (3, 8)).transpose(1, 2) for w in self.qkv)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def pruned():
    torch.manual_seed(0)
    x = torch.randn(3, 11, 24)
    model = Attention().eval()
    return model, x, prune(model, x, None, Config(sparsity=0.2, method="magnitude"))


def kinds(module):
    return [node.target for node in module.graph.nodes]


def value_width(module, x):
    seen = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            if n.target is attention:
                seen.append(self.env[n.args[2]].shape[-1])
            return super().run_node(n)

    Watch(module).run(x)
    return seen


def test_the_attention_of_a_pruned_graph_sees_values_as_wide_as_its_queries():
    _, x, result = pruned()
    graph = result.graph_module
    assert torch.ops.aten.constant_pad_nd.default in kinds(graph)
    assert value_width(graph, x) == [8]
    plain = narrow(graph)
    assert value_width(plain, x)[0] < 8
    assert all(map(operator.is_, plain.parameters(), graph.parameters()))


def test_widening_changes_no_number():
    _, x, result = pruned()
    wide = result.graph_module.double()
    plain = narrow(wide)
    assert torch.ops.aten.constant_pad_nd.default not in kinds(plain)
    y = torch.randn(2, 5, 24, dtype=torch.float64)
    assert torch.allclose(wide(y), plain(y), rtol=0, atol=1e-14)
    again = widen(plain, ((x.double(),), {}))
    assert torch.allclose(again(y), wide(y), rtol=0, atol=0)


def test_the_slice_has_the_name_of_the_attention():
    _, _, result = pruned()
    names = {node.name: node.target for node in result.graph_module.graph.nodes}
    assert names["scaled_dot_product_attention"] is torch.ops.aten.slice.Tensor


def test_onnx_has_no_padding(tmp_path):
    _, _, result = pruned()
    path = result.export_onnx(tmp_path / "model.onnx")
    assert "Pad" not in {node.op_type for node in onnx.load(path).graph.node}


def test_a_graph_without_narrow_values_is_left_as_it_is():
    model, x, _ = pruned()
    dense = torch.export.export(model, (x,)).module()
    assert widen(dense, ((x,), {})) is dense


class Fused(nn.Module):
    """Q and K of 24, V of `width`, as one product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, 48 + 3 * width)

    def forward(self, x):
        q, k, v = self.qkv(x).split([24, 24, self.qkv.out_features - 48], -1)
        q, k, v = (part.unflatten(-1, (3, -1)).transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)


def test_rows_of_a_product_of_odd_width_are_copied_before_the_attention():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    copies = {}
    for width in (8, 7):
        fused = Fused(width).double().eval()
        graph = torch.export.export(fused, (x,)).module()
        wide = widen(graph, ((x,), {}))
        copies[width] = kinds(wide).count(torch.ops.aten.clone.default)
        assert torch.allclose(wide(x), graph(x), rtol=0, atol=1e-14)
        assert torch.ops.aten.clone.default not in kinds(narrow(wide))
    assert copies == {8: 0, 7: 2}  # Q and K; V is padded, which copies it


def test_blocks_keep_together_what_is_aligned():
    def step(size, blocks, align):
        return _step(SimpleNamespace(size=size, blocks=blocks, kind="chain", members=()), align, ())

    heads = SimpleNamespace(size=768, blocks=12, least=1)
    assert step(768, 12, 16) == 4 and 12 * _count(heads, 0.36, 4, 1) == 480
    assert step(768, 12, 1) == 1 and _count(heads, 0.36, 1, 1) == 41
    assert step(48, 12, 64) == 1  # too coarse for 4 units
    assert step(3072, 1, 64) == 64


def masks():
    """Masks [*, 5, 5], and whether they are the causal one."""
    tril = torch.ones(5, 5, dtype=torch.bool).tril()
    one_row_more = tril.clone()
    one_row_more[0, 1] = True
    second = torch.stack([tril, one_row_more])[:, None]
    return [
        (tril, True),
        (tril[None, None].expand(2, 1, 5, 5), True),
        (tril.repeat(2, 3, 1, 1), True),
        (one_row_more, False),
        (second, False),
        (torch.ones_like(tril), False),
        (tril.float(), False),
        (tril.T, False),
    ]


@pytest.mark.parametrize("number", range(len(masks())))
def test_a_causal_mask_is_told_to_the_attention_and_no_other(number):
    mask, causal = masks()[number]
    node = SimpleNamespace(target=torch.ops.aten.scaled_dot_product_attention.default)
    generator = torch.Generator().manual_seed(0)
    operands = torch.randn(3, 2, 3, 5, 4, generator=generator, dtype=torch.double)
    if mask.dtype != torch.bool:
        mask = mask.double()
    args, kwargs = told_causal(node, (*operands, mask), {"scale": 0.3})
    assert kwargs == ({"scale": 0.3, "is_causal": True} if causal else {"scale": 0.3})
    assert len(args) == (3 if causal else 4)
    told = node.target(*args, **kwargs)
    assert torch.allclose(told, node.target(*operands, mask, scale=0.3), rtol=0, atol=1e-14)


def test_other_calls_and_masks_of_other_sizes_stay_as_they_are():
    attention = torch.ops.aten.scaled_dot_product_attention.default
    q, tril = torch.randn(1, 1, 5, 4), torch.ones(5, 5, dtype=torch.bool).tril()
    for target, args, kwargs in (
        (torch.ops.aten.add.Tensor, (q, q), {}),
        (attention, (q, q, q), {}),
        (attention, (q, q, q, None, 0.0, True), {}),
        (attention, (q[:, :, 1:], q, q, tril[1:]), {}),
        (attention, (q[:, :, :1], q, q, tril[:1, :1]), {}),
        (attention, (q, q, q, tril[:1, :1]), {}),
        (attention, (q, q, q), {"attn_mask": tril}),
    ):
        assert told_causal(SimpleNamespace(target=target), args, kwargs) == (args, kwargs)
