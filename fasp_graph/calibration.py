"""calibration: the batches of a run, checked and cut, and what the options need of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from passes.capture import Args, Captured, as_args
from passes.compare import tensors
from passes.errors import CalibrationError, NoGradient
from passes.lazy import is_lazy
from passes.restore import TOWARDS
from passes.score import GREEDY, NEEDS_DATA

from .config import Config
from .correction import PIECES
from .scale.microbatch import cut, rows_apart, rows_of

NAMED = 3  # weights of which a note says the names
FEWER = (*(("outputs", n) for n in PIECES), ("residual", 2))
"""Repairs and the batches that they need, dearest first."""


def needs_data(config: Config) -> bool:
    """Whether any step of the method looks at activations."""
    passes = config.passes
    return passes.score in NEEDS_DATA or passes.restore != "none" or passes.allocation != "uniform"


def refuse_dataless(calibration: Any, config: Config) -> None:
    """CalibrationError if there are no batches, and a step of the method needs some."""
    if calibration is None and needs_data(config):
        p = config.passes
        raise CalibrationError(
            f"score={p.score}, restore={p.restore}, allocation={p.allocation} need calibration "
            "batches · help: pass calibration=..., or method='magnitude'"
        )


def batches_of(calibration: Any, inputs: Args, config: Config) -> list[Args]:
    """The batches as arguments of the form of `inputs`; CalibrationError if there are none, or if
    one has another form.
    """
    refuse_dataless(calibration, config)
    if isinstance(calibration, (str, bytes, Tensor)) or not hasattr(calibration, "__iter__"):
        raise CalibrationError(
            f"calibration is {type(calibration).__name__}, not an iterable of batches · help: "
            f"give a list of inputs"
        )
    batches = [alike(as_args(batch), inputs, number) for number, batch in enumerate(calibration)]
    if not batches:
        raise CalibrationError("calibration is empty · help: give at least one batch of inputs")
    if all(_without_rows(batch, inputs) for batch in batches):
        raise CalibrationError(
            "every calibration batch is empty · help: give batches with at least one row"
        )
    return batches


def _without_rows(batch: Args, inputs: Args) -> bool:
    """Whether a tensor of the batch holds nothing, where that of `inputs` does hold something."""
    leaves = zip(pytree.tree_leaves(batch), pytree.tree_leaves(inputs), strict=True)
    pairs = [(new, old) for new, old in leaves if isinstance(new, Tensor)]
    return any(not new.numel() and old.numel() for new, old in pairs)


def alike(batch: Args, inputs: Args, number: int) -> Args:
    """The batch with the entries of its dicts in the order of `inputs`, since a graph binds by
    position, on their device; CalibrationError where names, counts or constants differ.
    """
    ordered = _ordered(batch, inputs)
    held, wanted = pytree.tree_flatten(ordered), pytree.tree_flatten(inputs)
    same = held[1] == wanted[1] and all(
        isinstance(old, Tensor) or type(new) is type(old) and new == old
        for new, old in zip(held[0], wanted[0], strict=True)
    )
    if not same:
        raise CalibrationError(
            f"calibration batch {number} is {_form(batch)}, but the model was captured with "
            f"{_form(inputs)} · help: give batches of the same form as `inputs`"
        )
    moved = [
        new.to(old.device) if isinstance(new, Tensor) and isinstance(old, Tensor) else new
        for new, old in zip(held[0], wanted[0], strict=True)
    ]
    return pytree.tree_unflatten(moved, held[1])  # type: ignore[no-any-return]


def _ordered(value: Any, like: Any) -> Any:
    if type(value) is not type(like) or not isinstance(value, (dict, list, tuple)):
        return value
    if isinstance(value, dict):
        if value.keys() != like.keys() or type(value) is not dict:
            return value
        return {key: _ordered(value[key], held) for key, held in like.items()}
    if len(value) != len(like) or type(value) not in (list, tuple):
        return value
    return type(value)(_ordered(one, other) for one, other in zip(value, like, strict=True))


def _form(args: Args) -> str:
    """Types and shapes in place of tensors: ('float32 [6, 7]', 2), {'mask': 'int64 [6, 7]'}."""

    def kind(value: Any) -> Any:
        tensor = isinstance(value, Tensor)
        return f"{value.dtype} {list(value.shape)}".removeprefix("torch.") if tensor else value

    told = pytree.tree_map(kind, args)
    return ", ".join(f"{part}" for part in told if part) or "empty"


def affordable(
    captured: Captured, batches: list[Args], config: Config
) -> tuple[list[Args], Config]:
    """The batches in as many pieces as sensing and correcting on a share of them needs; else a
    repair that needs fewer, unless the repair was asked for by name.
    """
    asked = config.passes.restore
    if not backward(config) or asked not in TOWARDS:
        return batches, config
    apart = False
    named = [pair for pair in FEWER if pair[0] == asked] or [(asked, 2)]
    for name, wanted in named if config.restore else FEWER:
        if name == "outputs" and not config.restore and is_lazy(captured.graph_module):
            continue  # a backward pass holds all weights at once
        pieces = math.ceil(wanted / len(batches))
        apart = apart or (pieces > 1 and rows_apart(captured))
        if pieces == 1 or (apart and all((rows_of(b) or 1) >= pieces for b in batches)):
            cuts = [piece for batch in batches for piece in cut(batch, pieces)]
            return cuts, config if name == asked else replace(config, restore=name)
    return batches, config if config.restore else replace(config, restore="affine")


def without_gradients(config: Config, error: NoGradient) -> Config:
    """The options for a model that has none; `error` where one that needs them was asked for."""
    named = (config.allocation == "sensitivity", config.score == "taylor")
    if any(named) or config.restore == "outputs":
        raise error
    restore = "affine" if config.passes.restore == "outputs" else config.passes.restore
    return replace(config, allocation="curves", restore=restore)


def backward(config: Config) -> bool:
    """Whether the metric of the outputs is needed."""
    return config.passes.allocation == "sensitivity" or config.passes.score == "taylor"


def sensing(config: Config) -> bool:
    """Whether statistics of the dense model are needed."""
    return config.passes.allocation != "uniform" or config.passes.score == "taylor"


def measuring(config: Config) -> bool:
    """Whether the budget is in seconds, which are measured."""
    return config.budget == "latency"


def solving(config: Config) -> bool:
    """Whether columns are chosen or repaired with the inverse of a Gram matrix."""
    return config.passes.score in GREEDY or config.passes.restore not in ("none", "bias")


def few_tokens(found: Mapping[str, tuple[int, int]], inputs: Args) -> tuple[str, ...]:
    """A note for each weight whose input has fewer tokens (of images: samples, each place of a
    convolution one) than channels: weight -> (tokens, channels). Its Gram matrix has no full
    rank, so the ridge decides what the data do not.
    """
    ids = any(not value.is_floating_point() for value in tensors(inputs))
    what = "tokens" if ids else "samples"
    return tuple(
        f"few {what}: {tokens} calibration {what} for the {channels} channels that enter {name}; "
        f"its repair leans on the ridge · help: calibrate on at least {channels} {what}"
        for name, (tokens, channels) in found.items()
        if tokens < channels
    )


def untold(found: Mapping[str, tuple[int, str]]) -> tuple[str, ...]:
    """Notes on weights of whose units calibration tells nothing: weight -> (tokens, its place)."""
    notes = []
    for reached, why in ((False, "no calibration token reaches"), (True, "only zeros reach")):
        names = [name for name, (tokens, _) in found.items() if bool(tokens) == reached]
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            notes.append(
                f"{why} {', '.join(names[:NAMED])}{more}, so that nothing is repaired there, and "
                "units that no other weight reads go by weight magnitude · "
                f"{found[names[0]][1]} · help: calibrate on more data, or on data that reach it"
            )
    return tuple(notes)
