"""The bar on a terminal."""

import io
import re

import torch
from rich.console import Console
from rich.progress import TimeRemainingColumn
from torch import nn

from fasp_graph import Config, prune
from fasp_graph.commands.progress import progress_bar, staged

CLOCK = r"\d:\d\d:\d\d"


def test_a_stage_does_not_show_the_counts_of_the_one_before():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)

    with progress_bar(console) as bars:
        progress = staged(bars, "  ")
        progress("prune", 3, 336)
        (first,) = bars.tasks
        seen = first.description, first.completed, first.total
        progress("prune", 336, 336)
        bars.refresh()
        progress("rewrite")
        (second,) = bars.tasks
        bars.refresh()

    assert "336/336" in console.file.getvalue() and "0/?" not in console.file.getvalue()
    assert seen == ("  prune", 3, 336)
    assert (second.description, second.completed, second.total) == ("  rewrite", 0, None)
    assert second.time_remaining is None


def test_a_bar_tells_the_time_that_went_by_and_that_is_left():
    clock = iter(range(0, 1000, 10))  # every look is ten seconds after the one before
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    bars = progress_bar(console)
    bars.get_time = lambda: float(next(clock))
    task = bars.add_task("prune", total=4)
    for _ in range(2):
        bars.advance(task)

    (held,) = bars.tasks
    elapsed, remaining = (str(column.render(held)) for column in bars.columns[-2:])

    assert re.fullmatch(CLOCK, elapsed) and elapsed != "0:00:00"
    assert isinstance(bars.columns[-1], TimeRemainingColumn) and re.fullmatch(CLOCK, remaining)


def test_a_walk_never_goes_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    data, told = [torch.randn(20, 6) for _ in range(3)], []

    def progress(stage, done, total):
        if stage == "prune" and total:
            told.append((done, total))

    prune(model.eval(), data[0], data, Config(method="fasp"), progress)
    assert told == sorted(told) and told[-1] == (5, 5) and len(told) > 6
