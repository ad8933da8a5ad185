"""What the claim "nothing silently wrong, nothing lost" rests on, counted anew.

    python -m benchmarks.trust [--seconds 300] [--kills 100] [--only programs,kills]
                               [--output build/trust.json] [--docs]

programs     random programs, pruned at random, against two references (benchmarks/soak.py)
mutants      the compact graph or the engine broken on purpose (tests/mutants.py)
bad_inputs   refused with a reason, or pruned exactly (tests/test_bad_input.py)
readers      tests that fuzz readers and look at pages and sources (tests/test_fuzz.py, _security)
faults       kills, resumed runs, full disks, altered files, rivals, lost ranks (faults.py)
mutation     small errors in the core of passes/, and how many the programs and the fast tests
             notice (benchmarks/mutation.py)
coverage     lines and branches that the whole suite runs: read from --coverage, which
             `coverage json` wrote; none if there is no such file

A part that is not named keeps the figures that the output file has. `--docs` writes the table of
docs/trust.md from benchmarks/results/trust.json; a test holds the two together. Exit code 1 if
anything was missed, lost or wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import fault_cases, faults, mutation, soak
from .soak import ROOT  # importing it puts tests/ on sys.path

RESULTS, PAGE = ROOT / "benchmarks/results/trust.json", ROOT / "docs/trust.md"
MARKS = ("<!-- figures: python -m benchmarks.trust --docs -->", "<!-- end of figures -->")
Part = dict[str, Any]


def programs(options: argparse.Namespace) -> Part:
    """Random programs for a time."""
    found = soak.soak(options.seconds, options.seed, options.output.parent)
    keys = ("programs", "verified", "eager", "refusals", "mismatches", "failures")
    return {key: found[key] for key in keys}


def mutants(options: argparse.Namespace) -> Part:
    """All mutants of all subjects."""
    import mutants as held

    total = {"tried": 0, "caught": 0, "harmless": 0, "missed": []}
    for name in held.SUBJECTS:
        for found in (held.results_tried(name), held.engine_tried(name)):
            total["caught"] += found.caught
            total["harmless"] += found.harmless
            total["missed"] += found.missed
    total["tried"] = total["caught"] + total["harmless"] + len(total["missed"])
    return total


def bad_inputs(options: argparse.Namespace) -> Part:
    """Cases of the table of bad inputs."""
    import test_bad_input as held

    return {"refused": len(held.REFUSED), "taken": len(held.TAKEN), **tests("test_bad_input.py")}


def readers(options: argparse.Namespace) -> Part:
    """Fuzzing, pages, sources."""
    return tests("test_fuzz.py", "test_security.py")


def tests(*names: str) -> Part:
    """Pytest's own count."""
    paths = [str(ROOT / "tests" / name) for name in names]
    call = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *paths]
    said = subprocess.run(call, cwd=ROOT, capture_output=True, text=True).stdout
    counts = {
        what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", said)
    }
    if not counts:
        raise RuntimeError(f"pytest counts nothing: {said[-500:]}")
    return {"tests": counts}


def all_faults(options: argparse.Namespace) -> Part:
    """Kills and the other faults; Lost ends the run."""
    with tempfile.TemporaryDirectory() as scratch:
        found = faults.bench(Path(scratch))
        counts = faults.kills(found, options.kills, options.seed, fresh=options.kills // 20)
        others = fault_cases.all_cases(found, options.seed)
    killed = sum(n for what, n in counts.items() if what.endswith("killed"))
    return {"kills": options.kills, "before the end": killed, "lost": 0, **counts, **others}


def coverage(options: argparse.Namespace) -> Part:
    """Package -> lines, branches, and how many of them the tests run."""
    if not options.coverage.exists():
        return {}
    files = json.loads(options.coverage.read_text("utf-8"))["files"]
    found: Part = {}
    for package in ("passes", "fasp_graph"):
        held = [file["summary"] for name, file in files.items() if name.startswith(f"{package}/")]
        keys = ("num_statements", "covered_lines", "num_branches", "covered_branches")
        found[package] = {key: sum(summary[key] for summary in held) for key in keys}
    return found


PARTS: dict[str, Callable[[argparse.Namespace], Part]] = {
    "faults": all_faults,  # it forks, so it comes before anything that starts threads
    "programs": programs,
    "mutants": mutants,
    "bad_inputs": bad_inputs,
    "readers": readers,
    "mutation": mutation.score,
    "coverage": coverage,
}
FAULTS = {  # counts of a fault -> name and outcome
    "full disks": ("full disks", "old folder whole, one clear error"),
    "altered weights refused": ("altered weights", "all refused"),
    "altered files refused": ("altered weights and configurations", "all refused"),
    "saves by two writers": ("saves by two writers at once", "one whole folder"),
    "kills while resuming": ("kill -9 of runs that may resume", "the same bytes at the end"),
    "lost ranks": ("ranks killed under torchrun", "the rest ends, the rank is named"),
}


def wrong(found: dict[str, Part]) -> list[str]:
    """What is not as it must be."""
    bad = [f"{found['programs']['mismatches']} mismatches"] * bool(found["programs"]["mismatches"])
    bad += [f"mutant missed: {name}" for name in found["mutants"]["missed"]]
    for part in ("bad_inputs", "readers"):
        counts = found[part]["tests"]
        bad += [f"{part}: {n} {what}" for what, n in counts.items() if what[:4] in ("fail", "erro")]
    return bad


def table(found: dict[str, Part]) -> str:
    """The figures as Markdown."""
    program, mutant, fault = found["programs"], found["mutants"], found["faults"]
    inputs, tested, small = found["bad_inputs"], found["readers"]["tests"], found["mutation"]
    rows = [
        (
            "random programs",
            program["programs"],
            f"{program['mismatches']} mismatches; "
            f"{program['verified']} pruned and equal, {program['refusals']} refused with a reason",
        ),
        (
            "mutants",
            mutant["tried"],
            f"{len(mutant['missed'])} missed; {mutant['caught']} caught, "
            f"{mutant['harmless']} harmless",
        ),
        (
            "bad inputs",
            inputs["refused"] + inputs["taken"],
            f"{inputs['tests'].get('failed', 0)} "
            f"wrong; {inputs['refused']} refused, {inputs['taken']} pruned exactly",
        ),
        (
            "kill -9",
            fault["kills"],
            f"{fault['lost']} lost; {fault['before the end']} hit before the run's end",
        ),
        *((name, fault[key], said) for key, (name, said) in FAULTS.items() if key in fault),
        ("tests of readers, pages, sources", tested["passed"], f"{tested.get('failed', 0)} failed"),
        (
            "small errors in the core of passes/",
            small["tried"],
            f"{small['noticed'] / small['tried']:.0%} noticed by random programs or the fast tests",
        ),
        *(_covered(name, held) for name, held in found.get("coverage", {}).items()),
    ]
    lines = [f"| {what} | {count:,} | {text} |" for what, count, text in rows]
    machine = found["machine"]
    return "\n".join(["| tried | count | outcome |", "|---|---|---|", *lines, "", machine["said"]])


def _covered(name: str, held: Part) -> tuple[str, int, str]:
    lines = held["covered_lines"] / held["num_statements"]
    branches = held["covered_branches"] / held["num_branches"]
    said = f"{lines:.1%} run by the tests; {branches:.1%} of {held['num_branches']:,} branches"
    return f"lines of {name}/", held["num_statements"], said


def page(text: str, found: dict[str, Part]) -> str:
    """docs/trust.md with the table between its marks."""
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n\n{table(found)}\n\n{MARKS[1]}{after}"


def _machine() -> Part:
    said = f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}."
    return {"said": f"Measured with {said}"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300, help="of random programs; of errors")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--sample", type=int, default=12, help="small errors in each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "trust.json")
    parser.add_argument("--coverage", type=Path, default=ROOT / "build" / "coverage.json")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/trust.md")
    options = parser.parse_args(argv)
    if options.docs:
        text = page(PAGE.read_text(encoding="utf-8"), json.loads(RESULTS.read_text("utf-8")))
        PAGE.write_text(text, encoding="utf-8")
        return 0
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(options.output.read_text("utf-8")) if options.output.exists() else {}
    for name in options.only.split(","):
        known |= {name: PARTS[name](options), "machine": _machine()}
        options.output.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(known[name]), flush=True)
    bad = wrong(known) if known.keys() >= PARTS.keys() else ["some parts were never run"]
    print("\n".join(bad) or table(known))
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
