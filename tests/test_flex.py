"""flex_attention: its mods are run on all scores at once, or the op stays as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import fasp_graph
from fasp_graph import Config
from fasp_graph.prune import Program, read
from passes.capture import capture

HEADS, GROUPS, SIZE, WIDE = 8, 4, 4, 24


class Block(nn.Module):
    """Grouped-query attention with the mods that `mods` makes of the block and the ids."""

    def __init__(self, mods: Callable[..., dict[str, Any]]) -> None:
        super().__init__()
        self.mods = mods
        self.embedding = nn.Embedding(17, WIDE)
        self.q = nn.Linear(WIDE, HEADS * SIZE)
        self.k, self.v = nn.Linear(WIDE, GROUPS * SIZE), nn.Linear(WIDE, GROUPS * SIZE)
        self.out = nn.Linear(HEADS * SIZE, 5)
        self.slope = nn.Parameter(torch.rand(HEADS))
        self.table = nn.Parameter(torch.randn(99, HEADS))
        self.register_buffer("bias", torch.randn(HEADS, 50, 50))

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, T] to numbers [B, T, 5]."""
        x = self.embedding(ids)
        q, k, v = (
            layer(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        y = flex_attention(q, k, v, enable_gqa=True, **self.mods(self, ids))
        return self.out(y.transpose(1, 2).flatten(2))


def nothing(block: Block, ids: Tensor) -> dict[str, Any]:
    return {}


def slopes(block: Block, ids: Tensor) -> dict[str, Any]:
    return {"score_mod": lambda s, b, h, i, j: s + block.slope[h] * (j - i)}


def biases(block: Block, ids: Tensor) -> dict[str, Any]:
    return {"score_mod": lambda s, b, h, i, j: s * 2 + block.bias[h, i, j] + block.bias[h][j][i]}


def tables(block: Block, ids: Tensor) -> dict[str, Any]:
    def mod(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return torch.where(i == j, s, 20 * torch.tanh((s + block.table[i - j + 49, h]) / 20))

    return {"score_mod": mod}


def own_words(block: Block, ids: Tensor) -> dict[str, Any]:
    """Scores between equal ids only."""
    return {"score_mod": lambda s, b, h, i, j: torch.where(ids[b, i] == ids[b, j], s, s - 3)}


def causal(block: Block, ids: Tensor) -> dict[str, Any]:
    length = ids.shape[1]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
    return {"block_mask": mask}


def causal_slopes(block: Block, ids: Tensor) -> dict[str, Any]:
    return causal(block, ids) | slopes(block, ids)


def none_first(block: Block, ids: Tensor) -> dict[str, Any]:
    """The first query sees no key: its result is zero."""
    length = ids.shape[1]
    mask = create_block_mask(lambda b, h, i, j: i > j, None, None, length, length, device="cpu")
    return {"block_mask": mask} | slopes(block, ids)


def of_one_word(block: Block, ids: Tensor) -> dict[str, Any]:
    """A mask that reads the input."""
    batch, length = ids.shape
    mask = create_block_mask(
        lambda b, h, i, j: ids[b, i] == ids[b, j], batch, None, length, length, device="cpu"
    )
    return {"block_mask": mask}


MODS = [of_one_word, nothing, slopes, biases, tables, own_words, causal, none_first]


def block(mods: Callable[..., dict[str, Any]]) -> Block:
    torch.manual_seed(0)
    return Block(mods).double().eval().requires_grad_(False)


@functools.cache
def program(mods: Callable[..., dict[str, Any]]) -> Program:
    return read(block(mods), ids())


def ids(batch: int = 3, length: int = 16) -> Tensor:
    return torch.randint(17, (batch, length), generator=torch.Generator().manual_seed(batch))


def calls(module: torch.fx.GraphModule) -> str:
    return " ".join(str(node.target) for node in module.graph.nodes)


@pytest.mark.xdist_group("flex")  # one capture for both
@pytest.mark.parametrize("mods", MODS)
def test_every_group_of_a_flexible_attention_is_pruned(mods: Callable[..., dict[str, Any]]) -> None:
    model = block(mods)
    config = Config(sparsity=0.5, method="magnitude", kinds=("chain", "bilinear", "head"))
    pruned = fasp_graph.prune(model, ids(), None, config, program=program(mods))
    cut = {group.kind for group in pruned.report.groups if group.kept < group.units}
    assert cut == {"chain", "bilinear", "head"}
    assert pruned.report.verify_max_error < 1e-12
    fresh = ids(5)
    torch.testing.assert_close(pruned.model(fresh), pruned.graph_module(fresh))


@pytest.mark.xdist_group("flex")
@pytest.mark.parametrize("mods", [nothing, causal])
def test_attention_without_a_score_mod_is_the_fused_op(mods: Callable[..., dict[str, Any]]) -> None:
    held = program(mods).captured.graph_module
    assert "scaled_dot_product_attention" in calls(held)
    assert "index_put" not in calls(held)  # nothing of the blocks' table stays


@pytest.mark.parametrize("mods", [nothing, tables])
def test_a_graph_takes_other_sizes_whatever_was_run_before(
    mods: Callable[..., dict[str, Any]],
) -> None:
    model, other = block(mods), ids(5, 9)
    model(ids())  # compiles for this size
    held = capture(model, ids()).graph_module
    torch.testing.assert_close(held(other), model(other))


def test_the_sum_of_exponentials_is_what_the_op_returns() -> None:
    class Sums(Block):
        def forward(self, ids: Tensor) -> Any:
            x = self.embedding(ids)
            q, k, v = (
                layer(x).unflatten(-1, (-1, SIZE)).transpose(1, 2)
                for layer in (self.q, self.k, self.v)
            )
            found = AuxRequest(lse=True)
            y, aux = flex_attention(q, k, v, enable_gqa=True, return_aux=found)
            return y, aux.lse

    torch.manual_seed(0)
    model = Sums(nothing).double().eval().requires_grad_(False)
    held = capture(model, ids()).graph_module
    assert "flex_attention" not in calls(held)
    torch.testing.assert_close(held(ids()), tuple(model(ids())), rtol=1e-6, atol=1e-6)


def summing(block: Block, ids: Tensor) -> dict[str, Any]:
    return {"score_mod": lambda s, b, h, i, j: s + (block.bias[h] * block.slope[h]).sum()}


def part_of_a_row(block: Block, ids: Tensor) -> dict[str, Any]:
    return {"score_mod": lambda s, b, h, i, j: s + block.bias[h, i].max()}


@pytest.mark.parametrize("mods", [summing, part_of_a_row])
def test_a_mod_that_does_more_leaves_the_op_and_the_rest_is_pruned(
    mods: Callable[..., dict[str, Any]],
) -> None:
    model = block(mods)
    model.out = nn.Sequential(nn.Linear(HEADS * SIZE, 16), nn.ReLU(), nn.Linear(16, 5)).double()
    model.requires_grad_(False)
    config = Config(sparsity=0.4, method="magnitude", kinds=("chain",))
    pruned = fasp_graph.prune(model, ids(), [ids()], config)
    assert {group.name for group in pruned.report.groups} == {"embedding.1", "out.0.0"}
    reasons = {frozen.name: frozen.reason for frozen in pruned.report.frozen}
    assert "no axis rule for flex_attention" in reasons["v.0"]


def test_the_pruned_attention_in_onnx_runtime(tmp_path: Path) -> None:
    model = block(causal_slopes).float()
    pruned = fasp_graph.prune(model, ids(), [ids()], Config(sparsity=0.3))
    fasp_graph.export_onnx(pruned, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (given,) = session.get_inputs()
    (found,) = session.run(None, {given.name: ids(5).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), pruned.model(ids(5)), rtol=1e-4, atol=1e-5)
