"""Every way to break the analysis or the rewriter that is tried is caught before anything is
written; the figures are printed.
"""

import copy
from dataclasses import replace

import mutants
import pytest
import torch

from passes.errors import FaspGraphError, VerificationError


@pytest.fixture(scope="module", params=list(mutants.SUBJECTS))
def name(request):
    return request.param


@pytest.fixture(scope="module")
def subject(name):
    found = mutants.subject(name)
    assert mutants.verified(found) <= 1e-9
    return found


def test_a_changed_compact_graph_is_caught(subject):
    missed = []
    makers = (mutants.of_weights, mutants.of_nodes, mutants.of_scales)
    tried = sum(len(list(make(subject.compact))) for make in makers)
    for number in range(tried):
        broken = copy.deepcopy(subject.compact)
        what, change = [pair for make in makers for pair in make(broken)][number]
        with torch.no_grad():
            change()
        try:
            mutants.verified(replace(subject, compact=broken))
            missed.append(what)
        except VerificationError:
            pass

    print(f"mutants of the result: {tried - len(missed)} of {tried} caught")
    assert tried >= 15 and not missed


def test_a_broken_engine_is_caught(name, subject, monkeypatch):
    """A mutant that survives must be seen to be harmless by a judge that is not verify."""
    model, caught, harmless, missed = mutants.build(mutants.SUBJECTS[name]), 0, 0, []
    for what, patch in mutants.of_engine():
        try:
            with monkeypatch.context() as patched:
                patched.setattr(*patch)
                broken = mutants.compiled(subject.module, subject.inputs)
            if mutants.same(broken, subject):
                continue
            mutants.verified(broken)
        except (FaspGraphError, RuntimeError, ValueError, LookupError):
            caught += 1
            continue
        if mutants.harmless(subject, broken, model):
            harmless += 1
        else:
            missed.append(what)

    print(f"mutants of the engine: {caught} caught, {harmless} harmless, {len(missed)} missed")
    assert caught >= 15 and not missed
