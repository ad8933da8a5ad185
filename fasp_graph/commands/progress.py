"""Progress on a terminal: what is being done, how far, for how long, and how long it will take."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Counted(MofNCompleteColumn):
    """done/total, where the total is known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


def progress_bar(console: Console) -> Progress:
    """Bars that vanish when done; none where stderr is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        _Counted(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def staged(bars: Progress, indent: str = "") -> Callable[..., None]:
    """`progress(stage, done, total)`; each stage has a bar of its own, with its own total and
    times, in place of the one before.
    """
    task, now = bars.add_task(indent, total=None), ""

    def progress(stage: str, done: int = 0, total: int = 0) -> None:
        nonlocal task, now
        if stage != now:
            bars.remove_task(task)
            task, now = bars.add_task(f"{indent}{stage}", total=None), stage
        bars.update(task, completed=done, total=total or None)

    return progress
