"""The mutation score of the compiler's core: how many small errors in its code the tests notice.

    python -m benchmarks.mutation [--files labels,rewrite] [--sample 100] [--seed 0] [--seconds 600]

A mutant is one function of passes/ in which one operator is another one: `<` for `<=`, `+` for
`-`, `and` for `or`, a number one larger, a condition turned. It is noticed if a random program then
fails, has other groups, or is refused (tests/trial.py: two references besides the verifier).
Functions that no program runs are not drawn: line coverage counts these. What survives is listed,
to be read: many are equivalent, since a limit, a message or a short cut is not a result.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import inspect
import json
import random
import signal
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .soak import ROOT  # importing it puts tests/ on sys.path

CORE = ("labels", "moves", "routing", "couple", "groups", "removal", "rewrite", "edits", "verify")
PROGRAMS = tuple(range(40, 48))  # seeds of tests/programs.py
PATIENCE = 60  # seconds for all programs; a mutant that hangs is noticed
OTHER: dict[type, type] = {
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt},
    **{ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult},
}


@dataclass(frozen=True)
class Mutant:
    """`function` with other code; `what` names file, line and change."""

    what: str
    function: types.FunctionType
    code: types.CodeType


def mutants(name: str, ran: set[types.CodeType]) -> Iterator[Mutant]:
    """Every mutant of the functions of passes/NAME.py whose code is in `ran`."""
    module = importlib.import_module(f"passes.{name}")
    tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
    functions = {f.__code__.co_qualname: f for f in _functions(module) if f.__code__ in ran}
    for place, node in enumerate(ast.walk(tree)):
        said = _changed(copy.deepcopy(node))
        if said is None:
            continue
        other = copy.deepcopy(tree)
        changed = next(n for k, n in enumerate(ast.walk(other)) if k == place)
        _changed(changed)
        line = getattr(node, "lineno", 0)
        for qualname, function in functions.items():
            first, lines = function.__code__.co_firstlineno, inspect.getsourcelines(function)[0]
            if first <= line < first + len(lines):
                code = _code(compile(other, str(module.__file__), "exec"), qualname)
                if code is not None and code.co_freevars == function.__code__.co_freevars:
                    yield Mutant(f"{name}.py:{line} in {qualname}: {said}", function, code)


def _changed(node: ast.AST) -> str | None:
    """Change a node in place; what was changed, or None."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        old = type(node.ops[0])
        node.ops[0] = OTHER[old]()
        return f"{old.__name__} -> {OTHER[old].__name__}"
    if isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in OTHER:
        old = type(node.op)
        node.op = OTHER[old]()
        return f"{old.__name__} -> {OTHER[old].__name__}"
    if isinstance(node, ast.Constant) and type(node.value) is int:
        node.value += 1
        return f"{node.value - 1} -> {node.value}"
    if isinstance(node, ast.If):
        node.test = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        ast.fix_missing_locations(node)
        return "condition turned"
    return None


def _functions(module: Any) -> Iterator[types.FunctionType]:
    """Functions and methods that a module defines."""
    for held in vars(module).values():
        inner = vars(held).values() if inspect.isclass(held) else (held,)
        for found in inner:
            found = getattr(found, "func", getattr(found, "fget", found))
            if inspect.isfunction(found) and found.__module__ == module.__name__:
                yield found


def _code(code: types.CodeType, qualname: str) -> types.CodeType | None:
    for held in code.co_consts:
        if isinstance(held, types.CodeType):
            if held.co_qualname == qualname:
                return held
            if found := _code(held, qualname):
                return found
    return None


def outcomes() -> list[Any]:
    """What the programs show: groups, how many were cut, refusals; or an error's class."""
    from programs import build, drawn, sample
    from trial import trial

    from passes.analysis import analysis
    from passes.capture import capture

    found: list[Any] = []
    for seed in PROGRAMS:
        captured = capture(build(drawn(seed).steps), sample(0), dynamic=False)
        found.append(analysis(captured.graph_module, captured.inputs, check=True).listing())
        found.append(trial(drawn(seed)))
    return found


def noticed(mutant: Mutant, expected: list[Any]) -> bool:
    """Whether the programs fail, hang or show anything else."""
    right = mutant.function.__code__
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(PATIENCE)
    try:
        mutant.function.__code__ = mutant.code
        return outcomes() != expected
    except Exception:  # whatever it is, it is seen
        return True
    finally:
        signal.alarm(0)
        mutant.function.__code__ = right


def _too_long(*_: Any) -> None:
    raise TimeoutError


def traced(call: Callable[[], Any]) -> tuple[set[types.CodeType], Any]:
    """The code that `call` runs, and what it gives."""
    ran: set[types.CodeType] = set()
    sys.setprofile(lambda frame, event, _: ran.add(frame.f_code) if event == "call" else None)
    try:
        return ran, call()
    finally:
        sys.setprofile(None)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", default=",".join(CORE))
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no mutant after these")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mutation.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    end = time.monotonic() + options.seconds
    ran, expected = traced(outcomes)
    every = [mutant for name in options.files.split(",") for mutant in mutants(name, ran)]
    drawn = random.Random(options.seed).sample(every, min(options.sample, len(every)))
    result: dict[str, Any] = {"mutants": len(every), "tried": 0, "noticed": 0, "survived": []}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for mutant in drawn:
        if time.monotonic() > end:
            break
        result["tried"] += 1
        if noticed(mutant, expected):
            result["noticed"] += 1
        else:
            result["survived"].append(mutant.what)
        result["score"] = round(result["noticed"] / result["tried"], 3)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
