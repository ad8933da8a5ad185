"""The tests with other versions of torch and transformers, in a virtual environment of their own.

    python -m benchmarks.compat --torch 2.11.0 --transformers 5.17.0 [--pip='--index-url ...'] \\
                                [-- tests/test_passes.py -x]

constraints.txt holds for all but torch, transformers and what these two choose (FREE). What stands
after `--` goes to pytest. Prints a line of JSON and keeps it in build/compat/.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FREE = (
    *("torch", "transformers", "tokenizers", "huggingface", "hf-xet", "triton", "sympy", "nvidia"),
    "setuptools",  # torch 2.11 takes none from 82 on
)


def constraints(text: str, torch: str, transformers: str) -> str:
    """constraints.txt with the two versions asked for, and without those that follow from them."""
    kept = [
        line for line in text.splitlines() if not line.lower().replace("_", "-").startswith(FREE)
    ]
    return "\n".join([*kept, f"torch=={torch}", f"transformers=={transformers}"]) + "\n"


def environment(folder: Path, torch: str, transformers: str, pip: list[str]) -> Path:
    """The Python of a virtual environment with these versions; made if it is not there."""
    python = folder / "bin" / "python"
    held = folder / "constraints.txt"
    wanted = constraints((ROOT / "constraints.txt").read_text("utf-8"), torch, transformers)
    if held.exists() and held.read_text("utf-8") == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (folder / "asked.txt").write_text(wanted, encoding="utf-8")
    call = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    call += [*pip, "-c", folder / "asked.txt", "-e", f"{ROOT}[test]"]
    subprocess.run(list(map(str, call)), check=True)
    (folder / "asked.txt").replace(held)
    return python


def tested(python: Path, arguments: list[str]) -> dict[str, Any]:
    """Pytest's counts, and the names of what failed."""
    call = [str(python), "-m", "pytest", "-rfE", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    counts = re.findall(r"(\d+) (passed|failed|errors?|skipped|xfailed)", done.stdout[-2000:])
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    said = {what: int(count) for count, what in counts}
    return {**said, "exit": done.returncode, "names": failed, "end": done.stdout[-300:]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", required=True)
    parser.add_argument("--transformers", required=True)
    parser.add_argument("--pip", default="", help="more arguments of pip install, in one text")
    parser.add_argument("tests", nargs="*", help="arguments of pytest")
    options = parser.parse_args(argv)
    place = ROOT / "build" / "compat" / f"torch-{options.torch}-transformers-{options.transformers}"
    place.parent.mkdir(parents=True, exist_ok=True)
    asked = (options.torch, options.transformers)
    python = environment(place, *asked, shlex.split(options.pip))
    found = {"torch": asked[0], "transformers": asked[1], **tested(python, options.tests)}
    place.with_name(f"{place.name}.json").write_text(json.dumps(found, indent=1), "utf-8")
    print(json.dumps({key: value for key, value in found.items() if key != "end"}))
    return int(found["exit"])


if __name__ == "__main__":
    raise SystemExit(main())
