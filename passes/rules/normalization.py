"""Normalisations: statistics over an axis mix it, a mean of squares leaves room for zeros;
per-channel statistics that are stored carry it.
"""

from __future__ import annotations

from . import Call, Rule


def _layer_norm(call: Call) -> str:
    names = " ".join(f"c{k}" for k in range(len(call["normalized_shape"])))
    return f"... {names}, {names}?, {names}? -> ... {names}; mixed {names}"


def _rms_norm(call: Call) -> str:
    names = " ".join(f"c{k}" for k in range(len(call["normalized_shape"])))
    return f"... {names}, {names}? -> ... {names}; mean {names}"


def _batch(call: Call) -> str:
    space = " ".join(f"x{k}" for k in range(len(call["input"]) - 2))
    mixed = f"; mixed n c {space}" if call.get("training", False) else ""
    return f"n c {space}, c?, c?, c?, c? -> n c {space}{mixed}"


def _group(call: Call) -> str:
    """With a group for every channel the channels do not mix."""
    space = " ".join(f"x{k}" for k in range(len(call["input"]) - 2))
    mixed = space if call["num_groups"] == call["input"][1] else f"c {space}"
    return f"n c {space}, c?, c? -> n c {space}" + (f"; mixed {mixed}" if mixed else "")


def _instance(call: Call) -> str:
    space = " ".join(f"x{k}" for k in range(len(call["input"]) - 2))
    return f"n c {space}, c?, c?, c?, c? -> n c {space}; mixed {space}"


def _softmax(call: Call) -> str:
    rank = len(call["self"])
    names = [f"a{k}" for k in range(rank)]
    joined = " ".join(names)
    return f"{joined} -> {joined}; mixed {names[call['dim'] % rank]}" if rank else " -> "


def _prelu(call: Call) -> str:
    """One slope for all, or one per channel (dim 1): zero stays zero."""
    names = [f"a{k}" for k in range(len(call["self"]))]
    slope = names[1] if len(names) > 1 and call["weight"][-1:] == call["self"][1:2] else "s"
    joined = " ".join(names)
    return f"{joined}, {slope} -> {joined}"


def _weight_norm(call: Call) -> str:
    """g v / ||v||: the norm runs over all dims but `dim`."""
    names = [f"a{k}" for k in range(len(call["v"]))]
    at = call.get("dim", 0) % len(names) if call.get("dim", 0) >= 0 else None
    scale = " ".join(name if k == at else f"g{k}" for k, name in enumerate(names))
    others = " ".join(name for k, name in enumerate(names) if k != at)
    joined = " ".join(names)
    return f"{joined}, {scale} -> {joined}; mixed {others}"


RULES: dict[str, Rule] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "batch_norm": _batch,
    "group_norm": _group,
    "instance_norm": _instance,
    "prelu": _prelu,
    "_weight_norm": _weight_norm,
    "softmax": _softmax,
    "_softmax": _softmax,
    "log_softmax": _softmax,
    "_log_softmax": _softmax,
}
