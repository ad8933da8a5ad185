"""Kills, full disks and rivals, in small; `python -m benchmarks.faults` is the whole.

The cases fork, and a fork of a process that has had threads may hang: they run in one of their own.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("faults")
SMALL = """
import json, random, sys, tempfile
from pathlib import Path
from benchmarks import fault_cases, fault_resume, faults
with tempfile.TemporaryDirectory() as scratch:
    bench = faults.bench(Path(scratch))
    found = {
        "kills": faults.kills(bench, 4, seed=1),
        "full disks": fault_cases.full_disks(bench, random.Random(0), 1),
        "resumes": fault_resume.resumes(bench, random.Random(3), 2),
        "altered": fault_cases.altered(bench, random.Random(0), 40),
        "writers": fault_cases.two_writers(bench, 3),
    }
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found():
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", SMALL], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_kill_leaves_the_old_folder_or_the_new_one(found):
    counts = found["kills"]

    assert sum(counts.values()) == 4
    assert sum(n for what, n in counts.items() if what.endswith("killed")) >= 3


def test_a_full_disk_is_told_and_changes_nothing(found):
    assert found["full disks"] >= 1


def test_a_run_that_is_killed_while_it_resumes_gives_the_same_bytes(found):
    counts = found["resumes"]

    assert counts["kills while resuming"] >= 3 and counts["stops taken over"] >= 1


def test_altered_files_do_not_load(found):
    assert found["altered"] == 40


def test_two_writers_leave_one_whole_folder(found):
    assert found["writers"] == 6
