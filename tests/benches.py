"""Measurements as programs of their own, and the figures that they write."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.running import Running

#: What a busy machine may need for a quick run; on a quiet one it takes a tenth of that.
TIMEOUT_S = 110


def figures_of(directory: Path, *arguments: str) -> dict[str, float]:
    """Run `python -m tests.bench` with these arguments; its figures by key. AssertionError with its output if it fails."""
    file = directory / "figures.json"
    with Running([sys.executable, "-m", "tests.bench", *arguments, "--json", str(file)]) as running:
        assert running.wait(TIMEOUT_S) == 0, running.output
    told = json.loads(file.read_text())["figures"]
    figures = {figure["key"]: figure["value"] for figure in told}
    assert len(figures) == len(told), "two figures have the same key"
    return figures
