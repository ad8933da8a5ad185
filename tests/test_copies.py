"""Copies of a captured graph: silent, and called like the graph."""

import copy
import pickle
import warnings

import torch
from torch.utils import _pytree as pytree

from passes.capture import capture


def test_a_copy_of_a_graph_warns_of_nothing(mlp):
    x = torch.randn(3, 7)
    graph = capture(mlp, x).graph_module

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = copy.deepcopy(graph)
        assert torch.equal(again(x), graph(x))
        leaf = pytree.tree_structure(0)
        assert copy.deepcopy(leaf) is leaf and pickle.loads(pickle.dumps(leaf)) is leaf
