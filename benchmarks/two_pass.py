"""FASP in the plain way: hooks on known modules of OPT and LLaMA, two forward passes per layer.

The reference of benchmarks/speed.py. Layer by layer: one pass gathers X^T X with hooks at the
consumers, columns are chosen and refitted, a second pass carries the pruned outputs on. It knows
its architectures by name, and it has the float64 arithmetic of passes/restore.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CONSUMERS = ("self_attn.out_proj", "self_attn.o_proj", "fc2", "mlp.down_proj")


class _Stop(Exception):
    """Raised by the hook that has caught the first layer's inputs."""


@torch.no_grad()
def two_pass(model: nn.Module, layers: nn.ModuleList, batches: list[Any], ratio: float) -> None:
    """Zero and refit the columns of every consumer, in place."""
    states = _inputs_of(model, layers[0], batches)
    for layer in layers:
        grams: dict[str, Tensor] = {}
        modules = dict(layer.named_modules())
        names = [name for name in CONSUMERS if name in modules]
        hooks = [modules[n].register_forward_pre_hook(_gather(grams, n)) for n in names]
        for args, kwargs in states:
            layer(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        for name in names:
            _prune(modules[name], grams[name], ratio)
        states = [((_first(layer(*args, **kw)), *args[1:]), kw) for args, kw in states]


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _inputs_of(model: nn.Module, layer: nn.Module, batches: list[Any]) -> list[Any]:
    caught: list[Any] = []

    def catch(module: nn.Module, args: Any, kwargs: Any) -> None:
        caught.append((args, kwargs))
        raise _Stop

    hook = layer.register_forward_pre_hook(catch, with_kwargs=True)
    for batch in batches:
        try:
            model(**batch, use_cache=False)
        except _Stop:
            continue
    hook.remove()
    return caught


def _gather(grams: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any], None]:
    def hook(module: nn.Module, args: Any) -> None:
        rows = args[0].flatten(0, -2).float()
        square = rows.T @ rows
        grams[name] = grams[name] + square if name in grams else square

    return hook


def _prune(module: nn.Module, gram: Tensor, ratio: float) -> None:
    """FASP's score and least squares; head balance is left out, which costs the reference less."""
    w, second = module.weight.detach().double(), gram.double()
    utility = w.abs().sum(0) * second.diagonal().sqrt()
    keep = torch.zeros(len(utility), dtype=torch.bool, device=w.device)
    keep[utility.topk(round((1 - ratio) * len(utility))).indices] = True
    system = second[keep][:, keep]
    system.diagonal().add_(1e-2 * system.diagonal().mean())
    right = w @ second[:, keep]
    new = torch.zeros_like(w)
    new[:, keep] = torch.cholesky_solve(right.T, torch.linalg.cholesky(system)).T
    module.weight.copy_(new.to(module.weight.dtype))
