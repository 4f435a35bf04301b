"""Figures -> a table on the terminal, and JSON."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Figure:
    """One measured number."""

    #: Stable name, for whoever reads the JSON.
    key: str
    #: What it is, for people.
    what: str
    #: None where it could not be measured.
    value: float | None
    unit: str
    #: The least (or with `is_limit` the most) it shall be; None if nothing was promised.
    target: float | None = None
    is_limit: bool = False

    @property
    def is_met(self) -> bool | None:
        """Whether the promise is kept; None where there is none, or no number."""
        if self.value is None or self.target is None:
            return None
        return self.value <= self.target if self.is_limit else self.value >= self.target


def machine() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **{name: version(name) for name in ("torch", "transformers", "celery")},
    }


def show(title: str, figures: list[Figure], digits: int = 3) -> None:
    """Print the table, values below 100 with so many digits."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("what")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    table.add_column("target", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for figure in figures:
        verdict = {True: "met", False: "missed", None: ""}[figure.is_met]
        target = "" if figure.target is None else f"{'≤' if figure.is_limit else '≥'} {shown(figure.target, digits)}"
        table.add_row(figure.what, shown(figure.value, digits), figure.unit, target, verdict)
    Console().print(table)


#: Columns of a wide table where nobody's terminal says how many there are.
_WIDTH = 150


def show_rows(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table whose first column is text, and all others figures as they shall be read."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)


def write(file: Path, run: dict[str, Any], figures: list[Figure]) -> None:
    """Write all as JSON; `run` says what was run."""
    rows = [asdict(figure) | {"is_met": figure.is_met} for figure in figures]
    file.write_text(json.dumps({**run, "machine": machine(), "figures": rows}, indent=1) + "\n", encoding="utf-8")


def shown(value: float | None, digits: int = 3) -> str:
    """A number with as many digits as say something."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"
