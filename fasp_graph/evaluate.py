"""Measures of a model: perplexity, FLOPs; its latency is in fasp_graph/timing.py.

perplexity = exp(-mean log p(x[t] | x[<t]))    over t = 1 .. T-1 of every window, not token 0
flops      = multiply-adds of matmuls, convolutions and attention, counted twice each, for one call
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from passes.compare import tensors
from passes.errors import FaspGraphError
from passes.state import steady


def perplexity(
    model: nn.Module, tokens: Tensor, batch: int = 16, stride: int | None = None
) -> float:
    """Perplexity of a language model on windows `tokens` [N, T] of int64 ids. With `stride` (the
    tokens from one window's start to the next) only the last `stride` tokens of a window count,
    in the first all but token 0: every token once, with T - stride tokens before it at least.

    The model maps ids [B, T] to logits [B, T, V]: a tensor, a tuple or list with the logits first,
    a mapping or an object with `logits`. A graph module is called as it was captured.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 2 or not len(tokens):
        raise FaspGraphError(
            f"perplexity needs tokens of shape [windows, length >= 2], not {tuple(tokens.shape)} · "
            "help: stack windows of equal length, at least one"
        )
    if stride is not None and not 0 < stride < tokens.shape[1]:
        raise FaspGraphError(
            f"stride={stride} must lie between 0 and {tokens.shape[1]} · help: it counts tokens "
            "from one window's start to the next; without it windows lie side by side"
        )
    device = next((p.device for p in model.parameters()), tokens.device)
    total, count = 0.0, 0
    with steady(model), torch.no_grad():
        if not isinstance(model, GraphModule):
            model.eval()
        for chunk in tokens.to(device).tensor_split(math.ceil(len(tokens) / batch)):
            logits = logits_of(call_with_tokens(model, chunk))[:, :-1]
            losses = F.cross_entropy(
                logits.flatten(0, 1).float(), chunk[:, 1:].flatten(), reduction="none"
            ).view(len(chunk), -1)
            start = 0 if stride is None else losses.shape[1] - stride
            total += float(losses[:, start:].double().sum())
            if stride is not None and not count:
                total += float(losses[0, :start].double().sum())
                count += start
            count += losses[:, start:].numel()
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


def spread(windows: Tensor, count: int) -> Tensor:
    """At most `count` of the windows [N, T], evenly over all: the first ones are of one kind of
    text, where the text is made of many files.
    """
    if count >= len(windows):
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).round().long()]


def call_with_tokens(model: nn.Module, tokens: Tensor) -> Any:
    """Call a language model on ids [B, T], in the way in which a graph module was captured."""
    spec = getattr(model, "_in_spec", None) if isinstance(model, GraphModule) else None
    if spec is None:
        return _called(model, tokens)
    positional, keyword = spec.children()
    if positional.num_children:
        if spec.num_leaves > 1:
            raise FaspGraphError(
                "perplexity cannot fill the inputs of this graph: it takes several · help: capture "
                "it with input_ids only"
            )
        return model(tokens)
    filled: dict[str, Any] = {}
    for name in keyword.context:
        if name == "attention_mask":
            filled[name] = torch.ones_like(tokens)
        elif name == "input_ids" or keyword.num_children == 1:
            filled[name] = tokens
        elif name == "use_cache":
            filled[name] = False
        else:
            raise FaspGraphError(
                f"perplexity cannot fill the input {name!r} of this graph · help: capture it with "
                "input_ids only"
            )
    return model(**filled)


def _called(model: nn.Module, tokens: Tensor) -> Any:
    try:
        return model(tokens)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the user's code, which may fail in any way
        raise FaspGraphError(
            f"perplexity gives the model token ids alone, {list(tokens.shape)}, and it fails: "
            f"{type(error).__name__}: {error} · help: leave the text out for a model of other "
            "inputs, such as an encoder with a decoder"
        ) from error


@torch.no_grad()
def reads_later(call: Callable[[Tensor], Tensor], ids: Tensor) -> bool:
    """Whether a later id changes the logits [B, T, V] that `call` makes of ids [B, T], as it does
    those of a masked model: they do not say the next token.
    """
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % (int(ids.max()) + 1)
    first, last = (call(given)[:, :-1] for given in (ids, other))
    same = 1e-4 if first.dtype == torch.float32 else 1e-2
    return bool(first.numel()) and bool((first - last).abs().max() > same * first.abs().max())


def logits_of(output: Any) -> Tensor:
    """The logits [B, T, V] in a model's output."""
    found = output
    if isinstance(output, Mapping) and "logits" in output:
        found = output["logits"]
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor) or found.dim() != 3:
        raise FaspGraphError(
            f"perplexity needs logits [batch, length, vocabulary]; the model returned "
            f"{type(output).__name__} · help: return them first, or as `logits`"
        )
    return found


def flops(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> int:
    """FLOPs of one call of `module`; attention counts alike whichever kernel would run it. The body
    of a scan or a while loop does not count: torch's counter refuses them.
    """
    counter = FlopCounterMode(display=False)
    kernel = sdpa_kernel(SDPBackend.MATH)
    with steady(module), torch.no_grad(), kernel, counter, _Uncounted():
        module(*args, **(kwargs or {}))
    return int(counter.get_total_flops())


class _Uncounted(TorchDispatchMode):
    """Runs the higher-order ops that the counter refuses outside of it."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        loops = isinstance(func, HigherOrderOperator) and func is not torch.ops.higher_order.cond
        with _disable_current_modes() if loops else nullcontext():
            return func(*args, **(kwargs or {}))


def shapes_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What FLOPs and latency are told of: `input_ids [3, 17]`, or `[3, 17]` without a name."""
    named = [("", args), *kwargs.items()]
    return ", ".join(
        f"{name} {list(tensor.shape)}".strip() for name, held in named for tensor in tensors(held)
    )


def size_of(module: nn.Module) -> tuple[int, int]:
    """(parameters, bytes) of a module; a tied parameter counts once."""
    parameters = list(module.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
