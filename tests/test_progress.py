"""The bar on a terminal."""

import io

from rich.console import Console

from fasp_graph.commands.progress import progress_bar, staged


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
