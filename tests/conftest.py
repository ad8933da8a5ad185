"""Shared test options and fixtures."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden listings")


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
