"""Every way to break the analysis or the rewriter that is tried is caught before anything is
written; the figures are printed.
"""

import mutants
import pytest


@pytest.mark.parametrize("name", mutants.SUBJECTS)
def test_a_changed_compact_graph_is_caught(name):
    assert mutants.verified(mutants.subject(name)) <= 1e-9

    found = mutants.results_tried(name)

    print(f"mutants of the result: {found.caught} caught, {len(found.missed)} missed")
    assert found.caught >= 15 and not found.missed


@pytest.mark.parametrize("name", mutants.SUBJECTS)
def test_a_broken_engine_is_caught(name):
    found = mutants.engine_tried(name)

    print(f"mutants of the engine: {found.caught} caught, {found.harmless} harmless")
    assert found.caught >= 15 and not found.missed
