"""recover: a short training of a pruned model, on text alone or towards the dense model.

    language model          L = (1 - w) CE(next token) + w KL(dense || pruned)        w = weight
    any other model         L = sum over outputs of ||f - f_dense||^2 / ||f_dense||^2
    no dense model          w = 0; only a language model can be trained so

With `lora` = r > 0 the weights stay and every linear layer W gets B A, rank r (LoRA,
arXiv 2106.09685, by peft); B A is added to W in the end, so what comes back has the shapes and the
classes of what went in. With 0 all weights are trained. Batches come in a seeded order, again and
again until `tokens` are spent; AdamW, the rate warms up over a tenth of the steps and falls to zero
along a cosine. Dropout and batch statistics stay off. Needs the extra: pip install
'fasp-graph[recover]'.
"""

from __future__ import annotations

import copy
import importlib
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.capture import as_args, tensors
from passes.errors import CalibrationError, FaspGraphError
from passes.rewrite import attribute

from .evaluate import logits_of
from .folders.loading import original_name
from .prune import Pruned

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Training:
    batches: Sequence[Any]
    teacher: nn.Module | None
    weight: float
    steps: Sequence[int]  # the batch of each step
    rate: float


@dataclass(frozen=True)
class Trained:
    """A trained model, and its course: steps, tokens (for inputs that are no ids: samples) and the
    loss of the first and of the last step, each before its update.
    """

    model: nn.Module
    steps: int
    tokens: int
    loss_first: float
    loss_last: float


def recover(
    pruned: Pruned | nn.Module,
    data: Iterable[Any],
    tokens: int | None = None,
    lora: int = 8,
    distill: nn.Module | None = None,
    weight: float = 0.5,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Any:
    """A trained copy of `pruned`, of the same type: a Pruned, or a model that `load` returned.

    `data`: batches like the calibration's. `tokens`: how many are trained on (for inputs that are
    no ids: samples); None: each batch once. `distill`: the dense model. `weight`: w above.
    """
    model = pruned.model if isinstance(pruned, Pruned) else pruned
    started = time.perf_counter()
    trained = train(model, data, tokens, lora, distill, weight, learning_rate, seed, progress).model
    if not isinstance(pruned, Pruned):
        return trained
    graph = _synchronised(pruned, trained)
    seconds = {**pruned.report.seconds, "recover": time.perf_counter() - started}
    report = replace(pruned.report, seconds=seconds)
    return replace(pruned, model=trained, graph_module=graph, report=report)


def train(
    model: nn.Module,
    data: Iterable[Any],
    tokens: int | None = None,
    lora: int = 8,
    distill: nn.Module | None = None,
    weight: float = 0.5,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Trained:
    """`recover` for a model alone, with the course of its training."""
    batches = list(data)
    if not batches:
        raise CalibrationError("no data to recover on · help: give at least one batch of inputs")
    if tokens is not None and tokens < 1:
        raise FaspGraphError(
            f"tokens={tokens} must be positive · help: leave it out to train on each batch once"
        )
    if lora < 0 or not 0 <= weight <= 1 or learning_rate <= 0:
        raise FaspGraphError(
            f"lora={lora}, weight={weight}, learning_rate={learning_rate} · help: lora is a rank, "
            "0 or more, weight lies between 0 and 1, learning_rate is positive"
        )
    sizes = [_size(batch) for batch in batches]
    order = _order(sizes, tokens, seed)
    training = _Training(batches, distill, weight, order, learning_rate)
    trained, losses = _trained(copy.deepcopy(model), training, lora, seed, progress)
    seen = sum(sizes[chosen] for chosen in order)
    return Trained(trained, len(order), seen, losses[0], losses[-1])


def _trained(
    model: nn.Module, training: _Training, lora: int, seed: int, progress: Progress | None
) -> tuple[nn.Module, list[float]]:
    """`model` itself after training, without adapters, and the losses; requires_grad and the mode
    are put back.
    """
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    mode = model.training
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = _adapted(model, lora) if lora else model.requires_grad_(True)
        losses = _train(wrapped.eval(), training, progress)
    model = wrapped.merge_and_unload() if lora else model  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name])
        parameter.grad = None
    return model.train(mode), losses


def _adapted(model: nn.Module, rank: int) -> nn.Module:
    """The model with a LoRA adapter beside every layer that can take one."""
    peft = _library("peft")
    names = [name for name, module in model.named_modules() if _adaptable(model, module)]
    if not names:
        raise FaspGraphError(
            f"{type(model).__name__} has no linear layer for LoRA · help: lora=0 trains all weights"
        )
    pattern = "|".join(map(re.escape, names))
    held: nn.Module = peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=f"(?:{pattern})")
    )
    return held


def _adaptable(model: nn.Module, module: nn.Module) -> bool:
    """A plain linear layer or convolution whose weight is its own: hooks and parametrisations of
    the pruned shapes would not reach the adapter, and a tied weight would change elsewhere.
    """
    from transformers.pytorch_utils import Conv1D

    if not isinstance(module, (nn.Linear, Conv1D, nn.Conv2d)) or getattr(module, "groups", 1) > 1:
        return False
    if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"):
        return False
    holders = [p for _, p in model.named_parameters(remove_duplicate=False) if p is module.weight]
    return len(holders) == 1


def _train(model: nn.Module, training: _Training, progress: Progress | None) -> list[float]:
    """The loss of each step."""
    accelerate = _library("accelerate")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.rate, weight_decay=0.0)
    total = len(training.steps)
    warm = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / total)),
    )
    accelerator = accelerate.Accelerator()
    model, optimizer = accelerator.prepare(model, optimizer)
    teacher = training.teacher
    if teacher is not None:
        teacher = copy.deepcopy(teacher).to(accelerator.device).eval()
    losses: list[float] = []
    for step, chosen in enumerate(training.steps):
        args, kwargs = _moved(as_args(training.batches[chosen]), accelerator.device)
        loss = _loss(model, teacher, args, kwargs, training.weight)
        reached = loss.detach().item()
        losses.append(reached)
        if not math.isfinite(reached):
            raise FaspGraphError(
                f"the loss is {reached} at step {step + 1} · help: a lower learning_rate"
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if progress:
            progress(f"recover, loss {reached:.3f}", step + 1, total)
    return losses


def _loss(
    model: nn.Module, teacher: nn.Module | None, args: Any, kwargs: Any, weight: float
) -> Tensor:
    output = model(*args, **kwargs)
    with torch.no_grad():
        dense = None if teacher is None else teacher(*args, **kwargs)
    ids = _ids(args, kwargs)
    if ids is not None and _speaks(output, ids):
        return _language_loss(
            logits_of(output), None if dense is None else logits_of(dense), ids, weight
        )
    if dense is None:
        raise FaspGraphError(
            f"{type(model).__name__} is no language model, so its inputs hold no target · help: "
            "distill=the dense model"
        )
    parts = [
        (ours - theirs).float().square().sum() / theirs.float().square().sum().clamp_min(1e-12)
        for ours, theirs in zip(tensors(output), tensors(dense), strict=True)
        if ours.is_floating_point()
    ]
    return torch.stack(parts).sum()


def _language_loss(logits: Tensor, dense: Tensor | None, ids: Tensor, weight: float) -> Tensor:
    ours = logits[:, :-1].flatten(0, 1).float()
    own = F.cross_entropy(ours, ids[:, 1:].flatten())
    if dense is None:
        return own
    theirs = dense[:, :-1].flatten(0, 1).float().log_softmax(-1)
    gap = F.kl_div(ours.log_softmax(-1), theirs, log_target=True, reduction="batchmean")
    return (1 - weight) * own + weight * gap


def _speaks(output: Any, ids: Tensor) -> bool:
    """Whether an output says the next token: logits [batch, length, more than any id]."""
    try:
        logits = logits_of(output)
    except FaspGraphError:
        return False
    named = hasattr(output, "logits") or isinstance(output, Tensor)
    return named and logits.shape[:2] == ids.shape and logits.shape[2] > int(ids.max())


def _ids(args: Any, kwargs: Any) -> Tensor | None:
    held = [kwargs["input_ids"]] if "input_ids" in kwargs else [*args, *kwargs.values()][:1]
    first = held[0] if held and isinstance(held[0], Tensor) else None
    whole = first is not None and first.dim() == 2 and first.dtype == torch.int64
    return first if whole else None


def _size(batch: Any) -> int:
    """Tokens of a batch; of inputs that are no ids, samples."""
    args, kwargs = as_args(batch)
    ids = _ids(args, kwargs)
    if ids is not None:
        return ids.numel()
    return next(len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor))


def _order(sizes: list[int], tokens: int | None, seed: int) -> list[int]:
    """Which batch each step takes: seeded permutations one after the other."""
    generator = torch.Generator().manual_seed(seed)
    wanted = sum(sizes) if tokens is None else tokens
    found: list[int] = []

    def endless() -> Iterator[int]:
        while True:
            yield from torch.randperm(len(sizes), generator=generator).tolist()

    for batch in endless():
        if wanted <= 0:
            return found
        found.append(batch)
        wanted -= sizes[batch]
    return found


def _moved(held: Any, device: torch.device) -> Any:
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, held)


def _synchronised(pruned: Pruned, model: nn.Module) -> GraphModule:
    """The compact graph with the trained weights; it must compute what the model does."""
    graph = copy.deepcopy(pruned.graph_module)
    padded = pruned.emission.padded
    with torch.no_grad():
        for name, _ in pruned.graph_module.named_parameters():
            theirs = attribute(model, original_name(name) if name in padded else name)
            ours = attribute(graph, name)
            if ours.shape == theirs.shape:
                ours.copy_(theirs)
    args, kwargs = pruned.inputs
    was = model.training
    with torch.no_grad():
        pairs = zip(
            tensors(graph(*args, **kwargs)), tensors(model.eval()(*args, **kwargs)), strict=False
        )
        agree = all(torch.allclose(a, b, 1e-3, 1e-4 * float(b.abs().max())) for a, b in pairs)
    model.train(was)
    if not agree:
        raise FaspGraphError(
            "the trained model and its graph disagree · help: recover the model that load returns"
        )
    return graph


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FaspGraphError(
            f"recover needs {name}, which is not installed · help: "
            "pip install 'fasp-graph[recover]'"
        ) from error
