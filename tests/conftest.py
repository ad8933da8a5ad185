"""Shared test options and fixtures."""

import gc
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

import models_zoo

torch.set_num_threads(1)
torch.manual_seed(0)  # what tests make as they are collected


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden listings")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """Tests of one named model, or with a fixture of their module, run in one process, where it is
    captured once, or made once, unless they are in another group.
    """
    for item in items:
        if item.get_closest_marker("xdist_group"):
            continue
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if isinstance(name, str) and name in models_zoo.BUILDERS:
            item.add_marker(pytest.mark.xdist_group(name))
        elif any(
            f.scope == "module" for fs in item._fixtureinfo.name2fixturedefs.values() for f in fs
        ):
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def pytest_collection_finish(session):
    """Groups are told to the workers; a million objects of libraries stay to the end, so that the
    collector need not visit them anew.
    """
    grouped = [item for item in session.items if item.get_closest_marker("xdist_group")]
    if session.config.getoption("loadgroup", False) and not all("@" in i.nodeid for i in grouped):
        raise pytest.UsageError("this pytest-xdist does not tell groups to this pytest")
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(autouse=True)
def seed():
    """The same numbers in every run, whatever ran before in this process."""
    torch.manual_seed(0)


@pytest.fixture
def mlp():
    """Three linear layers with a ReLU between; a plain model of a user."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(7, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 12),
        torch.nn.ReLU(),
        torch.nn.Linear(12, 5),
    )


@pytest.fixture
def run(monkeypatch, capsys):
    """The command line in this process: its words -> exit code, stdout, stderr."""
    from fasp_graph import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fasp-graph", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call
