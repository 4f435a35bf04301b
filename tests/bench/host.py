"""`python -m tests.bench host`: texts a second that the host can feed to a device which costs nothing.

The engine in this process as it is for an accelerator, with a real tokenizer, batches laid out and rows of a real size;
no pass, no queue. What is left is tokenizing, Python and copies: however fast a card is, a worker does no more than this.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from statistics import median

import numpy as np

from embedq.core.batching.job import Call
from embedq.core.checkpoint.read_spec import read_spec
from embedq.core.engine import Engine
from embedq.core.models import Launched
from embedq.core.models.requested_outputs import of_embedder
from embedq.core.models.token_layout import TokenLayout
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.sequence import Sequence, Tokens, Wanted
from embedq.core.settings import ModelSettings, Settings
from embedq.core.tokenizer import Tokenizer
from embedq.deploy.demo import minilm
from embedq.workers.worker import spare_the_garbage_collector
from tests.bench import real_texts, report, usage
from tests.bench.arguments import whole
from tests.bench.backlog import jobs_of
from tests.bench.report import Figure

_ALIAS = "host"

#: Texts of a job, and docstrings that all texts are made of.
_SIZES = (256, 1)
_NUM_DOCSTRINGS = 2_000

_BULK = 9

#: What the engine's threads do, by the first part of their names. Threads that Python does not know are the tokenizer's.
_USES_BY_THREAD = {"encode": "encoding", "device": "batches", "completion": "answers", "MainThread": "sending"}
_USES = (*_USES_BY_THREAD.values(), "tokenizer", "all else")


class NoPass:
    """An encoder without its weights: real token ids and layouts, and rows of zeros."""

    outputs = frozenset({"dense"})
    #: As on an accelerator, whose batches are large and by age; torch is never told of it.
    device, precision, reason, is_padded = "cuda:0", "bfloat16", "nothing is computed", False

    def __init__(self, directory: Path) -> None:
        self.spec = read_spec(_ALIAS, ModelSettings(path=str(directory)))
        self._tokenizer = Tokenizer(self.spec)

    def wanted(self, options: EmbedOptions | RerankOptions) -> Wanted:
        """See `core.models.Model.wanted`."""
        return of_embedder(self.spec, self.outputs, options)

    def encode_texts(self, texts: list[str], options: EmbedOptions) -> list[Tokens]:
        """See `core.models.Embedder.encode_texts`."""
        return self._tokenizer.encode(self.spec.write(texts, options), options.max_length)

    def launch(self, batch: list[Sequence], wanted: Wanted) -> Launched:
        """See `core.models.Model.launch`."""
        layout = TokenLayout(batch, "cpu")
        given = [layout.ids, layout.types, layout.places]  # what a pass is given
        assert all(len(each) == layout.num_tokens for each in given)
        rows = {"dense": np.zeros((len(batch), self.spec.dimensions), np.float32)}
        return lambda: rows


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    given = _parser().parse_args(arguments)
    model = NoPass(given.model or minilm.directory())
    spare_the_garbage_collector()
    figures = list(measure(model, given.texts, given.rounds))
    report.show(f"{given.texts:,} texts, a device that costs nothing", figures)
    if given.json:
        report.write(given.json, {"command": "host", "arguments": arguments}, figures)
    return 0


def measure(model: NoPass, num_texts: int, num_rounds: int) -> Iterator[Figure]:
    """Texts per second of each kind and size of job, and where their processor time goes."""
    real = real_texts.read(_NUM_DOCSTRINGS, model.spec.path)
    for kind, texts in (("short", real.short), ("mixed", real.mixed)):
        numbered = [f"{number} {texts[number % len(texts)]}" for number in range(num_texts)]  # no two are the same
        for size in _SIZES:
            found = [_run(model, jobs_of(numbered, size), num_texts) for _ in range(num_rounds)]
            key, told = f"{kind}_{size}", f"{kind} texts, jobs of {size}"
            yield Figure(f"{key}_per_s", told, median(per_s for per_s, _ in found), "texts/s")
            for use in _USES:
                each = median(cpu_us[use] for _, cpu_us in found)
                yield Figure(f"{key}_{use.replace(' ', '_')}_us", f"  processor time of a text: {use}", each, "µs")


def _run(model: NoPass, jobs: list[list[str]], num_texts: int) -> tuple[float, dict[str, float]]:
    """Texts per second, and µs of processor time for each text by what it is used for."""
    with Engine({_ALIAS: model}, Settings(models={_ALIAS: ModelSettings(path=str(model.spec.path))})) as engine:
        names = {thread.native_id: thread.name.partition("-")[0] for thread in threading.enumerate()}
        before, started_s = usage.thread_cpu_s(os.getpid()), time.perf_counter()
        answers = [engine.submit(_opened(engine, job), _BULK, sum(map(len, job))).answer for job in jobs]
        wait(answers)
        seconds = time.perf_counter() - started_s
        used = dict.fromkeys(_USES, 0.0)
        for thread, cpu_s in usage.thread_cpu_s(os.getpid()).items():
            use = _USES_BY_THREAD.get(names[thread], "all else") if thread in names else "tokenizer"
            used[use] += (cpu_s - before.get(thread, 0.0)) / num_texts * 1e6
    assert sum(len(answer.result()) for answer in answers) == num_texts, "rows are missing"
    return num_texts / seconds, used


def _opened(engine: Engine, texts: list[str]) -> Callable[[], Call]:
    return lambda: engine.calls.embed(texts)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench host", description=(__doc__ or "").partition("\n\n")[0]
    )
    parser.add_argument("--texts", type=whole(), default=40_000, help="texts of a round (40000)")
    parser.add_argument("--rounds", type=whole(), default=3, help="rounds, of which the median counts (3)")
    parser.add_argument("--model", type=Path, help="a directory whose tokenizer is used (MiniLM's)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser
