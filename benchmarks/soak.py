"""The random programs of tests/programs.py for a given time, and what they showed.

    python -m benchmarks.soak --seconds 600 [--seed 0] [--output build/soak.json]

Every failure is minimised (steps are dropped while it lasts) and written as a test file that fails.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from programs import Case, drawn  # noqa: E402
from trial import trial  # noqa: E402

TEST = '''"""A program on which {error}"""

from programs import Case
from trial import trial


def test_program_{seed}():
    outcome = trial(Case({steps!r}, {pruning}))

    assert outcome.cut
'''


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "soak.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = soak(options.seconds, options.seed, options.output.parent)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in found.items() if key != "refused"}))
    return 1 if found["failures"] else 0


def soak(seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """Trials from `seed` on until the time is over."""
    end = time.monotonic() + seconds
    counts: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    refused: dict[str, str] = {}
    failures: list[str] = []
    first = seed
    while time.monotonic() < end:
        case = drawn(seed)
        try:
            outcome = trial(case)
        except Exception as error:  # whatever it is, it is a finding
            failures.append(str(reproducer(case, error, seed, folder)))
        else:
            counts["refusals" if outcome.refusal else "verified" if outcome.cut else "idle"] += 1
            counts["eager"] += outcome.eager
            kinds.update(outcome.kinds)
            if outcome.refusal:
                refused[str(seed)] = outcome.refusal
        seed += 1
    return {
        "first_seed": first,
        "programs": seed - first,
        **{key: counts[key] for key in ("verified", "eager", "refusals", "idle")},
        "mismatches": len(failures),
        "kinds": dict(sorted(kinds.items())),
        "failures": failures,
        "refused": refused,
    }


def reproducer(case: Case, error: Exception, seed: int, folder: Path) -> Path:
    """A test file with the smallest program on which the same kind of error is seen."""
    case, error = minimised(case, error)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"test_program_{seed}.py"
    said = " ".join(f"{type(error).__name__}: {error}".replace('"', "'").split())[:80]
    text = TEST.format(error=said, seed=seed, steps=case.steps, pruning=case.pruning)
    path.write_text(text, encoding="utf-8")
    return path


def minimised(case: Case, error: Exception) -> tuple[Case, Exception]:
    """Drop one step after the other, as long as an error of the same class is left."""
    for place in reversed(range(len(case.steps))):
        for offset in range(4):  # the groups differ, so that other prunings may show it
            fewer = Case(case.steps[:place] + case.steps[place + 1 :], case.pruning + offset)
            again = failure(fewer)
            if type(again) is type(error):
                case, error = fewer, again
                break
    return case, error


def failure(case: Case) -> Exception | None:
    try:
        trial(case)
    except Exception as error:
        return error
    return None


if __name__ == "__main__":
    raise SystemExit(main())
