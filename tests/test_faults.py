"""Kills, full disks and rivals, in small; `python -m benchmarks.faults` is the whole."""

import random

import pytest

from benchmarks import fault_cases, fault_resume, faults


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return faults.bench(tmp_path_factory.mktemp("faults"))


def test_a_kill_leaves_the_old_folder_or_the_new_one(bench):
    counts = faults.kills(bench, 4, seed=1)

    assert sum(counts.values()) == 4
    assert sum(n for what, n in counts.items() if what.endswith("killed")) >= 3


def test_a_full_disk_is_told_and_changes_nothing(bench):
    assert fault_cases.full_disks(bench, random.Random(0), 1) >= 1


def test_a_run_that_is_killed_while_it_resumes_gives_the_same_bytes(bench):
    counts = fault_resume.resumes(bench, random.Random(3), 2)

    assert counts["kills while resuming"] >= 3 and counts["stops taken over"] >= 1


def test_altered_files_do_not_load(bench):
    assert fault_cases.altered(bench, random.Random(0), 40) == 40


def test_two_writers_leave_one_whole_folder(bench):
    assert fault_cases.two_writers(bench, 3) == 6
