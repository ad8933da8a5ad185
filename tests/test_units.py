"""Numbers as people read them."""

import pytest

from fasp_graph.units import counted, in_bytes, in_flops


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1234, "1.2 kB"), (11_020_032, "11.0 MB"), (14e10, "140.0 GB")],
)
def test_bytes(value, text):
    assert in_bytes(value) == text


def test_flops():
    assert in_flops(3_420_000_000) == "3.4 GFLOPs" and in_flops(5) == "5 FLOPs"


def test_plurals():
    told = [counted(count, "batch", "batches") for count in (0, 1, 2000)]

    assert told == ["0 batches", "1 batch", "2,000 batches"] and counted(2, "group") == "2 groups"
