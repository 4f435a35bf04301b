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
        target = "" if figure.target is None else f"{'≤' if figure.is_limit else '≥'} {_shown(figure.target, digits)}"
        table.add_row(figure.what, _shown(figure.value, digits), figure.unit, target, verdict)
    Console().print(table)


def write(file: Path, run: dict[str, Any], figures: list[Figure]) -> None:
    """Write all as JSON; `run` says what was run."""
    rows = [asdict(figure) | {"is_met": figure.is_met} for figure in figures]
    file.write_text(json.dumps({**run, "machine": machine(), "figures": rows}, indent=1) + "\n", encoding="utf-8")


def _shown(value: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"
