"""The mutation score of the compiler's core: how many small errors in its code the tests notice.

    python -m benchmarks.mutation [--sample 12] [--seed 0] [--seconds 600]

A mutant is one function of passes/ in which one operator is another one: `<` for `<=`, `+` for
`-`, `and` for `or`, a number one larger, a condition turned. It is noticed if a random program then
fails, has other groups, or is refused (tests/trial.py: two references besides the verifier), or
if one of TESTS fails. Functions that neither runs are not drawn: line coverage counts these. What
survives is listed, to be read: many are equivalent, since a limit, a message or a short cut is no
result.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import inspect
import io
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

import pytest
import torch

from .soak import ROOT  # importing it puts tests/ on sys.path

CORE = ("labels", "axes", "moves", "couple", "blocks", "rewrite", "select", "restore")
TESTS = ("test_restore.py", "test_select.py", "test_passes.py")
PROGRAMS = tuple(range(40, 44))  # seeds of tests/programs.py
PATIENCE = 300  # seconds for programs and tests; a mutant that hangs is noticed
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
    """Functions and methods written in a module's file (not those that dataclasses generate)."""
    for held in vars(module).values():
        inner = vars(held).values() if inspect.isclass(held) else (held,)
        for found in inner:
            found = getattr(found, "func", getattr(found, "fget", found))
            if inspect.isfunction(found) and found.__code__.co_filename == module.__file__:
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


def tests_pass() -> bool:
    """Whether TESTS pass, in this process; the first failure ends them."""
    paths = [str(ROOT / "tests" / name) for name in TESTS]
    quiet = ["-x", "-qq", "--no-summary", "--tb=no", "-p", "no:cacheprovider", "-W", "ignore"]
    with contextlib.redirect_stdout(io.StringIO()):
        return pytest.main([*quiet, *paths]) == 0


def noticed(mutant: Mutant, expected: list[Any], run_by_programs: bool) -> str:
    """What fails, hangs or shows anything else: `programs`, `tests`, or nothing."""
    right = mutant.function.__code__
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(PATIENCE)
    judge = "programs"
    try:
        mutant.function.__code__ = mutant.code
        if run_by_programs and outcomes() != expected:
            return judge
        judge = "tests"
        return "" if tests_pass() else judge
    except Exception:  # whatever it is, it is seen
        return judge
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


def score(options: argparse.Namespace) -> dict[str, Any]:
    """Mutants tried until `options.seconds` are over, and noticed; `survived`: the others."""
    end = time.monotonic() + options.seconds
    outcomes()  # imports and caches, so that the traced run is like those with mutants
    by_programs, expected = traced(outcomes)
    by_tests, right = traced(tests_pass)
    if not right:
        raise RuntimeError(f"without a mutant, {', '.join(TESTS)} fail")
    every = {name: list(mutants(name, by_programs | by_tests)) for name in CORE}
    draw = random.Random(options.seed)
    drawn = [
        m for held in every.values() for m in draw.sample(held, min(len(held), options.sample))
    ]
    draw.shuffle(drawn)
    result: dict[str, Any] = {
        "mutants": {name: len(held) for name, held in every.items()},
        **{"tried": 0, "noticed": 0, "by programs": 0, "by tests": 0, "survived": []},
    }
    for mutant in drawn:
        if time.monotonic() > end:
            break
        result["tried"] += 1
        if judge := noticed(mutant, expected, mutant.function.__code__ in by_programs):
            result["noticed"] += 1
            result[f"by {judge}"] += 1
        else:
            result["survived"].append(mutant.what)
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=12, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no mutant after these")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mutation.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = score(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
