"""The same seed and inputs give the same bytes on the CPU, whatever the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

from benchmarks import faults

ROOT = Path(__file__).parents[1]


def test_two_fresh_processes_write_the_same_bytes(tmp_path):
    """With other hash seeds, so that no order of a set gets into a choice or a file."""
    faults.source(tmp_path / "source")
    argv = ["prune", tmp_path / "source", "--calibration", "benchmarks.fault_cases:batches"]
    argv += ["--kinds", "chain", "--kinds", "head", "--seed", "3", "--json", "--output"]
    runs = []
    for seed in ("1", "2"):
        call = [sys.executable, "-m", "fasp_graph", *map(str, argv), str(tmp_path / seed)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        runs.append(
            subprocess.Popen(call, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        )
    reports = [json.loads(run.communicate(timeout=300)[0]) for run in runs]

    assert [run.returncode for run in runs] == [0, 0]
    assert faults.digests(tmp_path / "1") == faults.digests(tmp_path / "2")
    assert len(faults.digests(tmp_path / "1")) >= 5
    assert reports[0]["groups"] == reports[1]["groups"] and reports[0]["groups"]
