"""docs/trust.md shows the figures of benchmarks/results/trust.json, and these hold no failure."""

import json

from benchmarks import compat, trust


def test_the_page_shows_the_figures_that_were_measured():
    text = trust.PAGE.read_text(encoding="utf-8")

    assert trust.page(text, json.loads(trust.RESULTS.read_text(encoding="utf-8"))) == text


def test_nothing_was_missed_or_lost():
    found = json.loads(trust.RESULTS.read_text(encoding="utf-8"))

    assert trust.wrong(found) == [] and found["faults"]["lost"] == 0
    assert found["mutants"]["tried"] >= 50 and found["faults"]["kills"] >= 100


def test_a_failure_is_named():
    found = json.loads(trust.RESULTS.read_text(encoding="utf-8"))
    found["mutants"]["missed"] = ["a swap"]
    found["programs"]["mismatches"] = 2
    found["readers"]["tests"] = {"failed": 1, "passed": 3}

    assert trust.wrong(found) == ["2 mismatches", "mutant missed: a swap", "readers: 1 failed"]


def test_the_mutation_score_is_a_row():
    found = json.loads(trust.RESULTS.read_text(encoding="utf-8"))
    found["mutation"] = {"tried": 40, "noticed": 30}

    assert "| small errors in the core of passes/ | 40 | 75% noticed" in trust.table(found)


def test_other_versions_leave_the_rest_constrained():
    text = "numpy==2.4.6\ntorch==2.13.0\ntransformers==5.23.0\nhuggingface_hub==2.4.0\nrich==15.0\n"

    assert compat.constraints(text, "2.11.0", "5.17.0").split() == [
        *("numpy==2.4.6", "rich==15.0", "torch==2.11.0", "transformers==5.17.0")
    ]
