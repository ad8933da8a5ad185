"""One root class of errors, few children. A message says what happened, where, and what to do."""

from __future__ import annotations

import itertools
import re
import textwrap

from torch.fx import Node

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
REPORT = "help: this is a bug of fasp_graph, please report it with the model"


class FaspGraphError(Exception):
    """Root of all errors that this project raises on purpose."""


class CaptureError(FaspGraphError):
    """torch.export could not capture the model, or the capture computes other numbers."""


class UnsupportedOp(FaspGraphError):
    """An op or layout that a pass cannot rewrite."""


class CalibrationError(FaspGraphError):
    """Calibration data is missing, of the wrong form, or makes non-finite activations."""


class NoGradient(CalibrationError):
    """An op of the model has no derivative, and a step of the method needs one."""


class BudgetError(FaspGraphError):
    """The asked sparsity cannot be reached; the message states the largest that can."""


class ConfigError(FaspGraphError):
    """An option has a value that means nothing."""


class VerificationError(FaspGraphError):
    """The compact graph differs from the masked dense model: an internal error, nothing is
    written. `unable`: the dense graph does not take the inputs, or they need more memory.
    """

    unable = False


def brief(told: object, most: int) -> str:
    """A text in one line, without the colours of a terminal, cut behind a word."""
    return textwrap.shorten(_COLOUR.sub("", str(told)), most, placeholder=" ...")


def causes(error: BaseException, most: int) -> str:
    """What an error and what it came from say, the first cause first: the lines that fit."""
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    lines = [brief(line, most) for each in reversed(chain) for line in str(each).splitlines()]
    lines = [line for line in dict.fromkeys(lines) if line]
    ends = itertools.accumulate(len(line) + len(" · ") for line in lines)
    fit = [line for line, end in zip(lines, ends, strict=True) if end <= most + len(" · ")]
    return " · ".join(fit) or type(error).__name__


def where(node: Node, name: str = "") -> str:
    """`node %x -> (shape) · module m · file.py:12 in forward` for messages; `name`: another one."""
    value = node.meta.get("val")
    shape = f" -> {tuple(value.shape)}" if hasattr(value, "shape") else ""
    parts = (f"node %{name or node.name}{shape}", module_of(node), user_line(node))
    return " · ".join(part for part in parts if part)


def module_of(node: Node) -> str:
    """The innermost module that the node was captured in, as `module a.b.c`."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values() if entry and entry[0]]
    return f"module {paths[-1]}" if paths else ""


def user_line(node: Node) -> str:
    """`file.py:12 in forward`: the deepest frame of the stack trace that lies outside torch."""
    lines = (node.meta.get("stack_trace") or "").splitlines()
    frames = [line.strip() for line in lines if line.strip().startswith('File "')]
    frames = [frame for frame in frames if "/torch/" not in frame and '"<' not in frame]
    if not frames:
        return ""
    path, line, function = frames[-1].split(", ", 2)
    return f"{path[6:-1].rsplit('/', 1)[-1]}:{line.removeprefix('line ')} {function}"
