"""training: a short course for a copy of a model, towards the loss of fasp_graph/losses.py.

With `lora` = r > 0 the weights stay and every linear layer W gets B A, rank r (LoRA,
arXiv 2106.09685, by peft); B A is added to W in the end, so what comes back has the shapes and the
classes of what went in. With 0 all weights are trained. Batches come in a seeded order, again and
again until `tokens` are spent; AdamW, the rate warms up over a tenth of the steps and falls to zero
along a cosine. Dropout and batch statistics stay off.
"""

from __future__ import annotations

import copy
import importlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from passes.capture import as_args, placed
from passes.errors import CalibrationError, FaspGraphError

from .losses import is_language_model, loss, size

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Training:
    """How to train. `tokens`: how many are trained on (for inputs that are no ids: samples); None:
    each batch once. `distill`: the dense model. `weight`: w of the loss.
    """

    tokens: int | None = None
    lora: int = 8
    distill: nn.Module | None = None
    weight: float = 0.5
    learning_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_whole(self.lora) or not (self.tokens is None or _is_whole(self.tokens)):
            raise FaspGraphError(
                f"lora={self.lora!r}, tokens={self.tokens!r}: not whole numbers · help: lora is a "
                "rank, tokens how many to train on"
            )
        if not (self.distill is None or isinstance(self.distill, nn.Module)):
            raise FaspGraphError(
                f"distill={self.distill!r} is no model · help: distill=the dense nn.Module"
            )
        if self.tokens is not None and self.tokens < 1:
            raise FaspGraphError(
                f"tokens={self.tokens} must be positive · help: leave it out to train on each "
                "batch once"
            )
        if self.lora < 0 or not 0 <= self.weight <= 1 or not 0 < self.learning_rate < math.inf:
            raise FaspGraphError(
                f"lora={self.lora}, weight={self.weight}, learning_rate={self.learning_rate}: out "
                "of range · help: lora is a rank >= 0, weight in 0..1, learning_rate positive"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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


def train(
    model: nn.Module, data: Iterable[Any], training: Training, progress: Progress | None = None
) -> Trained:
    """A trained copy of `model`; `data`: batches like the calibration's."""
    batches = list(data)
    if not batches:
        raise CalibrationError("no data to recover on · help: give at least one batch of inputs")
    sizes = [size(batch) for batch in batches]
    order = _order(sizes, training.tokens, training.seed)
    steps = [batches[chosen] for chosen in order]
    trained, losses = _trained(copy.deepcopy(model), steps, training, progress)
    seen = sum(sizes[chosen] for chosen in order)
    return Trained(trained, len(order), seen, losses[0], losses[-1])


def _trained(
    model: nn.Module, steps: Sequence[Any], training: Training, progress: Progress | None
) -> tuple[nn.Module, list[float]]:
    """`model` itself after training, without adapters, and the losses; requires_grad, the modes
    and the device are put back.
    """
    device = next((held.device for held in model.parameters()), None)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {path: module.training for path, module in model.named_modules()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        wrapped = _adapted(model, training.lora) if training.lora else model.requires_grad_(True)
        losses = _train(wrapped.eval(), steps, training, progress)
    if training.lora:
        model = wrapped.merge_and_unload()  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name])
        parameter.grad = None
    for path, module in model.named_modules():
        module.training = modes[path]
    return model.to(device), losses


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


def _train(
    model: nn.Module, steps: Sequence[Any], training: Training, progress: Progress | None
) -> list[float]:
    """The loss of each step."""
    accelerate = _library("accelerate")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.learning_rate, weight_decay=0.0)
    schedule = _warmed(optimizer, len(steps))
    accelerator = accelerate.Accelerator()
    model, optimizer = accelerator.prepare(model, optimizer)
    teacher = training.distill
    if teacher is not None:
        teacher = copy.deepcopy(teacher).to(accelerator.device).eval()
    first = placed(as_args(steps[0]), accelerator.device)
    language = is_language_model(model, *first)
    losses: list[float] = []
    for step, batch in enumerate(steps):
        args, kwargs = placed(as_args(batch), accelerator.device)
        reached = loss(model, teacher, args, kwargs, training.weight, language)
        losses.append(reached.detach().item())
        if not math.isfinite(losses[-1]):
            raise FaspGraphError(
                f"the loss is {losses[-1]} at step {step + 1} · help: a lower learning_rate"
            )
        accelerator.backward(reached)
        accelerator.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if progress:
            progress(f"recover, loss {losses[-1]:.3f}", step + 1, len(steps))
    return losses


def _warmed(optimizer: torch.optim.Optimizer, total: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The rate's course: up over a tenth of the steps, down to zero along a cosine."""
    warm = max(1, total // 10)

    def rate(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / total))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


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


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise FaspGraphError(
            f"recover needs {name}, which is not installed · help: "
            "pip install 'fasp-graph[recover]'"
        ) from error
