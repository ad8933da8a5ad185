"""Normalisations: statistics over an axis mix it; per-channel statistics that are stored
carry it.
"""

from __future__ import annotations

from . import Call, Rule


def _trailing(call: Call) -> str:
    names = " ".join(f"c{k}" for k in range(len(call["normalized_shape"])))
    bias = f", {names}?" if "bias" in call.arguments else ""
    return f"... {names}, {names}?{bias} -> ... {names}; mixed {names}"


def _batch(call: Call) -> str:
    space = " ".join(f"x{k}" for k in range(len(call["input"]) - 2))
    mixed = f"; mixed n c {space}" if call.get("training", False) else ""
    return f"n c {space}, c?, c?, c?, c? -> n c {space}{mixed}"


def _group(call: Call) -> str:
    space = " ".join(f"x{k}" for k in range(len(call["input"]) - 2))
    return f"n c {space}, c?, c? -> n c {space}; mixed c {space}"


def _instance(call: Call) -> str:
    space = " ".join(f"x{k}" for k in range(len(call["input"]) - 2))
    return f"n c {space}, c?, c?, c?, c? -> n c {space}; mixed {space}"


def _softmax(call: Call) -> str:
    rank = len(call["self"])
    names = [f"a{k}" for k in range(rank)]
    joined = " ".join(names)
    return f"{joined} -> {joined}; mixed {names[call['dim'] % rank]}" if rank else " -> "


RULES: dict[str, Rule] = {
    "layer_norm": _trailing,
    "rms_norm": _trailing,
    "batch_norm": _batch,
    "group_norm": _group,
    "instance_norm": _instance,
    "softmax": _softmax,
    "_softmax": _softmax,
    "log_softmax": _softmax,
    "_log_softmax": _softmax,
}
