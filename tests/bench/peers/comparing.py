"""One comparison: a model, a task and a kind of text; all systems in turn, round after round."""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tests.bench.peers import flops, texts
from tests.bench.peers.models import Model
from tests.bench.peers.process import CannotMeasure, Program
from tests.bench.peers.systems import System, cosines
from tests.bench.peers.texts import Work

#: Whose vectors and scores the others are held against.
REFERENCE = "st-float32"


@dataclass(frozen=True)
class Case:
    """What is compared."""

    model: Model
    kind: str
    work: Work

    @property
    def key(self) -> str:
        return f"{self.model.name}_{self.model.task}_{self.kind}"

    @property
    def flops(self) -> float:
        """Of the whole work, without padding."""
        return flops.of_sequences(self.model.config, self.work.lengths, is_scored=self.model.task == "rerank")


@dataclass
class Row:
    """One system, asked in one way."""

    system: str
    way: str
    #: What it computes with, and its batch size; empty if it never started.
    about: dict[str, Any] = field(default_factory=dict)
    #: Of each round.
    seconds: list[float] = field(default_factory=list)
    texts_per_s: list[float] = field(default_factory=list)
    #: GFLOP/s of each round, to what the machine multiplies at most in this precision in the same round.
    shares: list[float] = field(default_factory=list)
    lowest_cosine: float | None = None
    #: Of a raw score; None for vectors.
    largest_difference: float | None = None
    #: The most memory it had in use, of all ways of asking it.
    peak_bytes: int | None = None
    #: Why there are no figures.
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.system}, {self.way}" if self.way else self.system

    @property
    def precision(self) -> str:
        return str(self.about.get("precision", ""))

    @property
    def rate(self) -> float | None:
        """Median of texts/s."""
        return median(self.texts_per_s) if self.texts_per_s else None

    @property
    def share(self) -> float | None:
        return median(self.shares) if self.shares else None


@dataclass(frozen=True)
class Compared:
    """All rows, and GFLOP/s by precision of each round."""

    case: Case
    rows: list[Row]
    limits: list[dict[str, float]]

    def limit(self, precision: str) -> float | None:
        """Median over the rounds."""
        found = [limits[precision] for limits in self.limits if precision in limits]
        return median(found) if found else None


def compare(case: Case, systems: list[System], num_rounds: int) -> Compared:
    """Every system in each round, so that a slow minute of the machine meets them all."""
    rows = {(system.name, way): Row(system.name, way) for system in systems for way in system.ways}
    limits: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(prefix="embedq-bench-") as directory:
        matrices = Program(Path(sys.executable), "matrices")
        turns = _Turns(case, rows, Path(directory))
        try:
            for number in range(num_rounds):
                say(f"{case.key}, round {number + 1} of {num_rounds}")
                limits.append({})
                for system in systems:
                    # Before every turn, the best of the round: one moment may be another program's.
                    found = matrices.ask({"action": "measure"})
                    limits[-1] |= {name: max(value, limits[-1].get(name, 0)) for name, value in found.items()}
                    turns.take(system)
                told = ", ".join(f"{name} {value:,.0f}" for name, value in limits[-1].items())
                say(f"  products of matrices: {told} GFLOP/s")
                _note_shares(case, rows, number, limits[-1])
        finally:
            matrices.close()
            for system in systems:
                system.stop()
        _note_agreement(case, rows, Path(directory))
    return Compared(case, list(rows.values()), limits)


class _Turns:
    """Takes systems through their turns."""

    def __init__(self, case: Case, rows: dict[tuple[str, str], Row], directory: Path) -> None:
        self._case, self._rows, self._directory = case, rows, directory
        self._started: set[str] = set()

    def take(self, system: System) -> None:
        """One turn; what cannot be measured says why in its rows and is left out from then on."""
        rows = [self._rows[system.name, way] for way in system.ways]
        if rows[0].reason:
            return
        try:
            if system.name not in self._started:
                about = system.start(self._case.model, self._case.work)
                self._started.add(system.name)
                for row in rows:
                    row.about = about
            for row in rows:
                self._measure(system, row)
            for row in rows:
                row.peak_bytes = max(system.peak_bytes, row.peak_bytes or 0)
        except CannotMeasure as error:
            for row in rows:
                row.reason = str(error)
            say(f"  {system.name}: not available: {error}")
            self._stop(system)
        if self._case.model.is_large or system.stops_after_turn:
            self._stop(system)

    def _measure(self, system: System, row: Row) -> None:
        save = None if row.seconds else _file(self._directory, row)
        seconds = system.measure(row.way, self._case.work, save)
        row.seconds.append(seconds)
        row.texts_per_s.append(self._case.work.num_sequences / seconds)
        say(f"  {row.name}: {row.texts_per_s[-1]:,.1f} texts/s")

    def _stop(self, system: System) -> None:
        system.stop()
        self._started.discard(system.name)


def say(what: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def describe(case: Case) -> str:
    """What is measured, and how long the sequences are."""
    what = "texts" if case.work.texts else f"passages, {len(case.work.calls)} queries"
    return (
        f"{case.model.name}, {case.model.task}, {case.kind}: {case.work.num_sequences:,} {what}, "
        f"{texts.distribution(case.work.lengths)}; {case.flops / 1e9:,.0f} GFLOP; "
        f"weights of {case.model.weights_bytes / 2**20:,.0f} MiB"
    )


def _note_shares(case: Case, rows: dict[tuple[str, str], Row], number: int, limits: dict[str, float]) -> None:
    """Hold what each computed in this round against what the machine multiplied at most in it."""
    for row in rows.values():
        if len(row.seconds) > number and row.precision in limits:
            row.shares.append(case.flops / row.seconds[number] / 1e9 / limits[row.precision])


def _note_agreement(case: Case, rows: dict[tuple[str, str], Row], directory: Path) -> None:
    """Hold what each saved against the reference."""
    reference = directory / f"{REFERENCE}-.npy"
    if not reference.is_file():
        return
    expected = np.load(reference)
    for row in rows.values():
        file = _file(directory, row)
        if file.is_file():
            found = np.load(file)
            row.lowest_cosine = float(cosines(found, expected, case.work).min())
            if found.ndim == 1:
                row.largest_difference = float(np.abs(found - expected).max())


def _file(directory: Path, row: Row) -> Path:
    return directory / f"{row.system}-{row.way.replace(' ', '-')}.npy"
