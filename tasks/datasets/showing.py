"""Shows a status as lines, and progress as a bar on a terminal or a line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedq.tasks.datasets.status import Status

#: Seconds between two lines where nobody watches a terminal.
LINE_EVERY_S = 60.0


def shown(status: Status) -> str:
    """A status in lines."""
    parts, rows = status.parts, status.rows
    lines = [
        status.state,
        f"  parts   {parts.completed:,} of {parts.total:,} done, {parts.running:,} running, {parts.waiting:,} waiting, "
        f"{parts.failed:,} failed",
        f"  rows    {rows.completed:,} of {rows.total:,} done, {status.failed_rows:,} without a vector",
        f"  speed   {status.rows_per_s:,.0f} rows/s, {status.tokens_per_s:,.0f} tokens/s; {status.bytes:,} bytes written",
    ]
    if status.seconds_left:
        lines.append(f"  left    {duration(status.seconds_left)}")
    lines += [f"  part {number:,} failed: {words}" for number, words in list(status.errors.items())[:10]]
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Seconds as people say them: "2 h 05 min", "3 min 20 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Progress:
    """A bar with rich on a terminal, a line a minute into anything else. A context manager."""

    def __init__(self, file: Any = None, every_s: float = LINE_EVERY_S) -> None:
        self._file = file or sys.stderr
        self._every_s = every_s
        self._next_line_s = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._file.isatty() and find_spec("rich"):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(file=self._file))
            self._bar.start()
            self._task = self._bar.add_task("", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def told(self, status: Status) -> None:
        """A run's status now."""
        left = f", {duration(status.seconds_left)} left" if status.seconds_left else ""
        words = f"{status.state}, {status.rows_per_s:,.0f} rows/s{left}"
        self.show(status.rows.completed, status.rows.total, words)

    def loaded(self, num_rows: int, total: int, rows_per_s: float) -> None:
        """Rows that a load has written so far."""
        self.show(num_rows, total, f"{rows_per_s:,.0f} rows/s")

    def show(self, done: int, total: int, words: str) -> None:
        """So many of so many."""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, description=words)
        elif (now_s := time.monotonic()) >= self._next_line_s:
            self._next_line_s = now_s + self._every_s
            print(f"{done:,} of {total:,} rows, {words}", file=self._file, flush=True)
