"""`python -m tests.bench engine`: what batching across jobs is worth, and what it costs.

One run, one machine, one server, one worker per configuration: ratios between its figures count,
the figures themselves are the machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embedq import tasks
from embedq.core.devices import cpu_devices
from embedq.core.errors import EmbedqError
from embedq.deploy.demo import minilm
from tests.bench import backlog, latency, random_models, real_texts, report
from tests.bench.arguments import whole
from tests.bench.real_texts import RealTexts
from tests.bench.report import Figure
from tests.bench.running import Subject, Worker, server, worker

#: Texts of a job that is large enough for its own batches.
_TEXTS_PER_JOB = 256

#: Texts of a job of the bulk load that interactive calls meet: small, so that the queue stays full of
#: them whatever the worker takes ahead.
_TEXTS_PER_LOAD_JOB = 8

#: Interactive reranks: passages of each, and seconds between two.
_NUM_PASSAGES, _EVERY_S = 20, 0.2

#: Texts below which there would not be enough different passages.
_MIN_TEXTS = 2 * _NUM_PASSAGES

#: Of the short texts, how many are sent to the worker that computes them one by one.
_ALONE_SHARE = 0.2


@dataclass(frozen=True)
class Asked:
    """How much is measured."""

    subject: Subject
    num_texts: int
    num_rounds: int
    #: Calls of the latency measurements.
    num_calls: int
    #: Seconds of interactive calls to an idle worker; under the load they last as long as it does.
    idle_s: float


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        with random_models.chosen(given.random, given.model) as model:
            subject = Subject(model, given.device, given.precision, dict(pair.split("=", 1) for pair in given.set))
            asked = (
                Asked(subject, given.texts or 64, 1, 30, 1.0)
                if given.quick
                else Asked(subject, given.texts or 5_000, given.rounds, 400, 20.0)
            )
            figures, worker_line = measure(asked)
            run = {
                "command": "engine",
                "worker": worker_line,
                "arguments": arguments,
                "num_texts": asked.num_texts,
                "rounds": asked.num_rounds,
            }
            name = given.random or given.model or minilm.ALIAS
            title = f"{name} on {given.device}, {asked.num_texts:,} texts, {asked.num_rounds} rounds"
            report.show(title, figures)
            if given.json:
                report.write(given.json, run, figures)
    except EmbedqError as error:
        print(f"python -m tests.bench engine: {error}", file=sys.stderr)
        return 1
    return 0


def measure(asked: Asked) -> tuple[list[Figure], str]:
    """All figures, in the order of the table; and what the worker said of its model."""
    found = real_texts.read(asked.num_texts, asked.subject.model)
    with server() as url:
        with worker(asked.subject, url) as subject:
            figures = _of_small_jobs(subject, found, asked)
            figures += _of_interactive_calls(subject, found, asked)
            total = latency.one_by_one(lambda index: tasks.embed.delay([found.short[0]]), asked.num_calls)
        # Each alone on the machine: the second worker and the bare pass start when the first has ended.
        batched = next(figure.value for figure in figures if figure.key == "short_one_text_jobs_texts_per_s")
        figures += _of_batches_of_one(url, found, batched, asked)
    return figures + _of_one_call(found.short[0], total, asked), subject.model_line


def _of_small_jobs(worker: Worker, found: RealTexts, asked: Asked) -> list[Figure]:
    """One-text jobs against jobs of 256; both kinds of texts."""
    figures = []
    for kind, texts, tokens, target in (
        ("mixed", found.mixed, found.mean_mixed_tokens, 0.9),
        ("short", found.short, found.mean_short_tokens, 0.8),
    ):
        kinds = {"small": backlog.jobs_of(texts, 1), "large": backlog.jobs_of(texts, _TEXTS_PER_JOB)}
        rounds = backlog.alternate(worker, kinds, asked.num_rounds)
        small, large = backlog.texts_per_s(rounds["small"]), backlog.texts_per_s(rounds["large"])
        told = f"{kind} texts ({tokens:.0f} tokens)"
        figures += [
            Figure(f"{kind}_one_text_jobs_texts_per_s", f"{told}: one-text jobs", small, "texts/s"),
            Figure(f"{kind}_large_jobs_texts_per_s", f"{told}: jobs of {_TEXTS_PER_JOB}", large, "texts/s"),
            Figure(f"{kind}_ratio", "  one-text jobs to large ones", small / large, "", target),
        ]
        for name, told in (("small", "one-text jobs"), ("large", f"jobs of {_TEXTS_PER_JOB}")):
            figures += _of_batches(f"{kind}_{name}", f"{kind} texts, {told}", rounds[name][-1])
    return figures


def _of_batches(key: str, told: str, drained: backlog.Drained) -> list[Figure]:
    """What the worker counted over one backlog."""
    # Its own clock also runs while the queue is filled and the worker waits.
    counted = drained.counted and drained.counted | {"wall_s": drained.seconds}

    def share(number: str, of: str, scale: float = 1.0) -> float | None:
        return scale * counted[number] / counted[of] if counted.get(of) and number in counted else None

    tokens = share("tokens", "padded_tokens")
    padding = None if tokens is None else 1 - tokens
    return [
        Figure(f"{key}_padding", f"  {told}: padding", padding, "of tokens", 0.05, is_limit=True),
        Figure(f"{key}_fill", "    batch fill", share("padded_tokens", "budget_tokens"), "of budget"),
        Figure(f"{key}_batch_sequences", "    sequences of a batch", share("sequences", "batches"), ""),
        Figure(f"{key}_computing", "    device thread computes", share("compute_s", "wall_s"), "of time", 0.95),
        Figure(f"{key}_batch_ms", "    batch", _batch_ms(counted), "ms"),
        Figure(f"{key}_python", "    the worker's other threads", drained.others_share, "of time", 0.2, is_limit=True),
        Figure(f"{key}_idle", "    cores with nothing to do", drained.idle_share, "of all", 0.05, is_limit=True),
    ]


def _batch_ms(counted: dict[str, Any]) -> float | None:
    """Mean time of a batch; several streams compute at once."""
    return 1000 * counted["streams"] * counted["compute_s"] / counted["batches"] if counted.get("batches") else None


def _of_interactive_calls(worker: Worker, found: RealTexts, asked: Asked) -> list[Figure]:
    """Reranks of 20 short passages every 200 ms on the idle worker, then beside a bulk load; and the load alone.

    Short ones: 100 mixed texts per second are as much as a small CPU computes at all, so that a
    load could but lose.
    """
    passages, jobs = found.short, backlog.jobs_of(found.mixed, _TEXTS_PER_LOAD_JOB)

    def send(index: int) -> Any:
        start = index * _NUM_PASSAGES % (len(passages) - _NUM_PASSAGES)
        return tasks.rerank.delay(passages[-1 - index % 50], passages[start : start + _NUM_PASSAGES])

    latency.one_by_one(send, 1)
    end_s = time.monotonic() + asked.idle_s
    idle = latency.paced(send, _EVERY_S, lambda: time.monotonic() > end_s)
    loaded: list[np.ndarray] = []
    alone, beside = [], []
    for _ in range(asked.num_rounds):
        alone.append(backlog.drain(worker, jobs))
        beside.append(
            backlog.drain(worker, jobs, lambda has_ended: loaded.append(latency.paced(send, _EVERY_S, has_ended)))
        )
    return _interactive_figures(idle, np.concatenate(loaded), alone, beside)


def _interactive_figures(
    idle: np.ndarray, loaded: np.ndarray, alone: list[backlog.Drained], beside: list[backlog.Drained]
) -> list[Figure]:
    (idle_p50, idle_p99), (p50, p99) = latency.percentiles_ms(idle), latency.percentiles_ms(loaded)
    batch_ms = _batch_ms(alone[-1].counted)
    loss = 1 - backlog.texts_per_s(beside) / backlog.texts_per_s(alone)
    own = _interactive_share(alone[-1], beside[-1])
    waits = (
        None if batch_ms is None else (p50 - idle_p50) / batch_ms,
        None if batch_ms is None else (p99 - idle_p99) / batch_ms,
    )
    rate = _NUM_PASSAGES / _EVERY_S
    return [
        Figure(
            "interactive_idle_p50_ms",
            f"reranks of {_NUM_PASSAGES}, idle worker, {len(idle)} calls: p50",
            idle_p50,
            "ms",
        ),
        Figure("interactive_idle_p99_ms", "  p99", idle_p99, "ms"),
        Figure("interactive_loaded_p50_ms", f"  beside a bulk load, {len(loaded)} calls: p50", p50, "ms"),
        Figure("interactive_loaded_p99_ms", "  p99", p99, "ms"),
        Figure("bulk_batch_ms", "  one bulk batch", batch_ms, "ms"),
        Figure("interactive_wait_p50_batches", "  added by the load, p50", waits[0], "batches", 1.0, is_limit=True),
        Figure("interactive_wait_p99_batches", "  added by the load, p99", waits[1], "batches", 2.0, is_limit=True),
        Figure("bulk_alone_texts_per_s", "bulk load alone", backlog.texts_per_s(alone), "texts/s"),
        Figure("bulk_beside_texts_per_s", f"  beside {rate:.0f} passages/s", backlog.texts_per_s(beside), "texts/s"),
        Figure("bulk_loss", "  loss", loss, "", 0.1, is_limit=True),
        Figure("interactive_share", "    share of the calls themselves", own, "of all"),
        Figure(
            "bulk_interference", "    loss beyond that", None if own is None else loss - own, "", 0.1, is_limit=True
        ),
    ]


def _interactive_share(alone: backlog.Drained, beside: backlog.Drained) -> float | None:
    """What the interactive calls computed beside the bulk load, of all that was computed meanwhile, in padded tokens."""
    if not alone.counted.get("padded_tokens"):
        return None
    return 1 - alone.counted["padded_tokens"] / beside.counted["padded_tokens"]


def _of_batches_of_one(url: str, found: RealTexts, batched: float | None, asked: Asked) -> list[Figure]:
    """The same short one-text jobs where no two sequences share a batch."""
    texts = found.short[: int(len(found.short) * _ALONE_SHARE)]
    with worker(asked.subject, url, max_batch_sequences="1") as alone:
        rounds = backlog.alternate(alone, {"": backlog.jobs_of(texts, 1)}, asked.num_rounds)[""]
    rate = backlog.texts_per_s(rounds)
    gain = None if batched is None else batched / rate
    return [
        Figure("short_alone_texts_per_s", "short texts, one-text jobs, one by one", rate, "texts/s"),
        Figure("short_gain", "  batching across jobs to one by one", gain, "×", 3.0),
    ]


def _of_one_call(text: str, total: np.ndarray, asked: Asked) -> list[Figure]:
    """What is between `.delay()` and `.get()` beside the forward pass."""
    load = {"path": str(asked.subject.model), "device": asked.subject.device, "precision": asked.subject.precision}
    given = json.dumps({"text": text, "num_calls": asked.num_calls, **load})
    command = [sys.executable, "-m", "tests.bench.bare"]
    # With as many threads as a worker of this device has.
    threads = cpu_devices(1)[0].environment() if asked.subject.device == "cpu" else {}
    answer = subprocess.run(
        command, input=given, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **threads}
    )
    bare = json.loads(answer.stdout)
    (p50, p99), (bare_p50, bare_p99) = (
        latency.percentiles_ms(total),
        latency.percentiles_ms(np.array(bare["forward_s"])),
    )
    encode_p50 = latency.percentiles_ms(np.array(bare["encode_s"]))[0]
    return [
        Figure("one_text_p50_ms", f"one short text, idle worker, {len(total)} calls: p50", p50, "ms"),
        Figure("one_text_p99_ms", "  p99", p99, "ms"),
        Figure("forward_p50_ms", "  bare forward pass: p50", bare_p50, "ms"),
        Figure("forward_p99_ms", "  p99", bare_p99, "ms"),
        Figure("encode_p50_ms", "  bare encoding: p50", encode_p50, "ms"),
        Figure("overhead_p50_ms", "  beside the forward pass: p50", p50 - bare_p50, "ms"),
        Figure("overhead_p99_ms", "  p99, to the pass's p50", p99 - bare_p50, "ms"),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench engine", description=__doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--quick", action="store_true", help="few texts and calls, one round: shows that it works, not how fast")
    add("--texts", type=whole(_MIN_TEXTS), metavar="N", help="texts of each kind (default: 5,000; 64 if quick)")
    add(
        "--rounds",
        type=whole(),
        default=3,
        metavar="N",
        help="rounds of which the median is told (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    add("--model", type=Path, metavar="PATH", help="an embedder's directory (default: the demo's MiniLM)")
    add("--random", choices=sorted(random_models.SHAPES), help="a model of this shape with random weights instead")
    add(
        "--device",
        default="cpu",
        help="where the worker computes, as `python -m embedq.workers devices` names it (default: cpu)",
    )
    add("--precision", default="auto", help="arithmetic of the model (default: %(default)s)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the worker; may be repeated")
    return parser
