"""`python -m tests.bench quality`: what a precision costs in search, on a task that any machine can build.

The task: the first sentence of a docstring is the question, the rest of it the one right answer among the rests of
all. Docstrings are the standard library's, weights the real MiniLM's. Recall@1 is the share of questions whose
answer is first, MRR the mean of 1 over its place. All against float32, which comes first.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from embedq import core
from embedq.core.settings import Precision
from embedq.deploy.demo import minilm, texts
from tests.bench import report
from tests.bench.arguments import whole
from tests.bench.report import Figure

#: What is compared with float32.
PRECISIONS = ("bfloat16", "int8")

#: The most that recall@1 may lose, in absolute terms: half a point.
MAX_LOSS = 0.005

#: A question, and what is left to find: less is a label, and no text that could be searched for.
_SPLIT = re.compile(r"(.{15,200}?[.!?])\s+(.{60,})", re.DOTALL)

#: Docstrings read at most; more than the standard library has.
_ALL = 1_000_000


@dataclass(frozen=True)
class Quality:
    """What one precision gave."""

    recall_at_1: float
    mrr: float
    #: Cosines of all vectors, of questions and answers, to those in float32.
    lowest_cosine: float
    mean_cosine: float


def read_pairs(max_pairs: int) -> tuple[list[str], list[str]]:
    """(questions, answers), the same on every run of the same Python; no text is there twice."""
    found: dict[str, str] = {}
    answers: set[str] = set()
    for text in texts.read(_ALL):
        split = _SPLIT.match(text.text)
        if split and split[1] not in found and split[2] not in answers:
            found[split[1]] = split[2]
            answers.add(split[2])
        if len(found) == max_pairs:
            break
    return list(found), list(found.values())


def measure(model: Path, pairs: tuple[list[str], list[str]], precisions: Sequence[Precision]) -> dict[str, Quality]:
    """Of each precision, and of float32 before them."""
    questions, answers = pairs
    exact = _vectors(model, [*questions, *answers], "float32")
    qualities = {"float32": _quality(exact, exact)}
    for precision in precisions:
        qualities[precision] = _quality(_vectors(model, [*questions, *answers], precision), exact)
    return qualities


def _vectors(model: Path, chosen: list[str], precision: Precision) -> np.ndarray:
    """(num_texts, dim) of length 1."""
    with core.load(str(model), device="cpu", precision=precision) as engine:
        return np.asarray(engine.embed(chosen, normalize=True))


def _quality(vectors: np.ndarray, exact: np.ndarray) -> Quality:
    """Both (2 * num_pairs, dim): questions, then answers."""
    questions, answers = np.split(vectors, 2)
    scores = questions @ answers.T  # (num_pairs, num_pairs)
    places = 1 + (scores > np.diag(scores)[:, np.newaxis]).sum(axis=1)
    cosines = (vectors * exact).sum(axis=1)
    return Quality(float((places == 1).mean()), float((1 / places).mean()), float(cosines.min()), float(cosines.mean()))


def figures_of(qualities: dict[str, Quality]) -> list[Figure]:
    least = qualities["float32"].recall_at_1 - MAX_LOSS
    figures = []
    for name, quality in qualities.items():
        target = None if name == "float32" else least
        figures.append(Figure(f"{name}_recall_at_1", f"{name}: recall@1", quality.recall_at_1, "", target))
        figures.append(Figure(f"{name}_mrr", f"{name}: MRR", quality.mrr, ""))
        if name != "float32":
            figures.append(Figure(f"{name}_lowest_cosine", "  lowest cosine to float32", quality.lowest_cosine, ""))
            figures.append(Figure(f"{name}_mean_cosine", "  mean cosine to float32", quality.mean_cosine, ""))
    return figures


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    given = _parser().parse_args(arguments)
    pairs = read_pairs(given.pairs)
    qualities = measure(given.model or minilm.directory(), pairs, given.precisions)
    figures = figures_of(qualities)
    report.show(f"{len(pairs[0]):,} docstrings: first sentence -> the rest", figures, digits=5)
    if given.json:
        run = {"command": "quality", "arguments": arguments, "num_pairs": len(pairs[0])}
        report.write(given.json, run, figures)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench quality", description=__doc__)
    parser.add_argument("--pairs", type=whole(), default=3_000, help="docstrings, at most (3000)")
    parser.add_argument("--model", type=Path, help="a directory; else the real MiniLM")
    parser.add_argument(
        "--precisions", nargs="+", default=PRECISIONS, choices=get_args(Precision), help="compared with float32"
    )
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser
