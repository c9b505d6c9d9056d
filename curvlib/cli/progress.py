"""How a race looks while it runs: a live table on a terminal, sparse lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from curvlib.cli.race import Entrant

__all__ = ["RaceProgress"]

_LINE_EVERY = 20.0


class RaceProgress:
    """Shows each contestant's step, loss, speed and time left; a context manager.

    Parameters
    ----------
    console
        Where to show it.
    seconds
        Each contestant's budget.
    """

    def __init__(self, console: Console, seconds: float) -> None:
        self._console = console
        self._budget = seconds
        # Rich's own refresh thread would take processor time from the contestants.
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._last_line = time.monotonic()

    def __enter__(self) -> RaceProgress:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def warming_up(self, name: str) -> None:
        """Say that a contestant's throw-away copy runs."""
        if self._live is not None:
            self._live.update(f"warming up {name}", refresh=True)

    def turn_over(self, entrants: Sequence[Entrant], current: Entrant) -> None:
        """Show all contestants after a turn."""
        if self._live is not None:
            self._live.update(self._table(entrants), refresh=True)
        elif time.monotonic() - self._last_line >= _LINE_EVERY:
            self._last_line = time.monotonic()
            for entrant in entrants:
                self._console.print(self._line(entrant), soft_wrap=True, highlight=False)
        if not current.running:
            self._console.print(f"{current.name}: {current.status}", soft_wrap=True, highlight=False, markup=False)

    def evaluated(self, entrant: Entrant) -> None:
        """Do nothing: the next turn's end shows it."""

    def _table(self, entrants: Sequence[Entrant]) -> Table:
        table = Table("optimizer", "step", "batch loss", "test accuracy", "steps/s", "left")
        for column in table.columns[1:]:
            column.justify = "right"
        for entrant in entrants:
            table.add_row(entrant.name, *self._cells(entrant))
        return table

    def _line(self, entrant: Entrant) -> str:
        step, loss, accuracy, speed, left = self._cells(entrant)
        return f"{entrant.name}: step {step}, batch loss {loss}, test accuracy {accuracy}, {speed} steps/s, {left} left"

    def _cells(self, entrant: Entrant) -> tuple[str, str, str, str, str]:
        speed = f"{entrant.steps / entrant.seconds:.1f}" if entrant.seconds else "-"
        loss = "-" if entrant.loss is None else f"{entrant.loss:.4f}"
        accuracy = f"{entrant.curve[-1].test_accuracy:.4f}" if entrant.curve else "-"
        left = f"{max(self._budget - entrant.seconds, 0):.0f} s" if entrant.running else "0 s"
        return str(entrant.steps), loss, accuracy, speed, left
