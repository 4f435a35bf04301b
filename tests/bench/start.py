"""`python -m tests.bench start`: from the start of a worker's process to the answer of its first job.

The job waits in the queue before the worker is started, as at every scale-out. Each round starts one process on an
otherwise empty server, waits for the job's result and ends the process. With `--against` another checkout takes turns,
each by its own code; what it needs must be installed where this one runs. Files are in the page cache after the first
round, which does not count.

Seconds of the wall tell what users wait for, on a quiet machine only; processor seconds tell what was saved on any.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from embedq import tasks
from embedq.deploy.demo import minilm
from tests.bench import report, usage
from tests.bench.arguments import whole
from tests.bench.report import Figure
from tests.bench.running import ALIAS, server
from tests.running import ROOT, Running

#: From the start of the process to the first answer: MiniLM, from a warm disk, on a quiet machine of two cores.
_MOST_S = 3.0

_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Start:
    """One start, in seconds since the process was made."""

    #: When its models were loaded and warm, when it said that it takes jobs, and when the first was answered.
    warm_s: float
    ready_s: float
    answered_s: float
    #: What loading and warming up took of `warm_s`, by the worker's own clock; the rest is imports and settings.
    loading_s: float
    #: Processor seconds and memory up to the answer.
    cpu_s: float
    peak_bytes: int


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    asked = _parser().parse_args(arguments)
    checkouts = {"this": ROOT} | ({"other": asked.against.resolve()} if asked.against else {})
    model = asked.model or minilm.directory()
    seen: dict[str, list[Start]] = {name: [] for name in checkouts}
    with server() as url, tempfile.TemporaryDirectory(prefix="embedq-start-") as directory:
        for number in range(1 if asked.quick else asked.rounds + 1):
            for name, checkout in checkouts.items():
                one = start(checkout, Path(directory) / name, model, asked.precision, url)
                if number or asked.quick:
                    seen[name].append(one)
    figures = [figure for name, starts in seen.items() for figure in _figures(name, starts)]
    if asked.against:
        figures.append(Figure("cpu_ratio", "processor time: this to the other", _ratio(seen), ""))
    num_rounds = len(seen["this"])
    report.show(f"start of a worker, {num_rounds} rounds, {asked.precision}", figures)
    if asked.json:
        report.write(asked.json, {"command": "start", "arguments": arguments, "rounds": num_rounds}, figures)
    return 0


def start(checkout: Path, directory: Path, model: Path, precision: str, url: str) -> Start:
    """Start a worker by the code in `checkout` and end it after its first job."""
    job = tasks.embed.delay(["a ferry"])
    begun_s = time.monotonic()
    with _worker(checkout, directory, model, precision, url) as running:
        running.wait_for("action=warm", timeout_s=_TIMEOUT_S)
        warm_s = time.monotonic() - begun_s
        running.wait_for("action=worker_ready", timeout_s=_TIMEOUT_S)
        ready_s = time.monotonic() - begun_s
        job.get(timeout=_TIMEOUT_S)
        answered_s = time.monotonic() - begun_s
        cpu_s, peak_bytes = usage.cpu_s(running.process.pid), usage.peak_bytes(running.process.pid)
        (line,) = running.wait_for("action=warm")
    job.forget()
    loading_s = float(line.partition("seconds=")[2].split()[0])
    return Start(warm_s, ready_s, answered_s, loading_s, cpu_s, peak_bytes)


@contextmanager
def _worker(checkout: Path, directory: Path, model: Path, precision: str, url: str) -> Iterator[Running]:
    """One worker process as the launcher starts it. Its imports find `checkout` as `embedq`, or its folders at the top."""
    is_named = (checkout / "__init__.py").is_file()
    directory.mkdir(exist_ok=True)
    if is_named and not (directory / "embedq").exists():
        (directory / "embedq").symlink_to(checkout)
    environment = {
        "PYTHONPATH": str(directory if is_named else checkout),
        "EMBEDQ_REDIS_URL": url,
        "EMBEDQ_MODELS": json.dumps({ALIAS: {"path": str(model), "precision": precision}}),
        "EMBEDQ_DEFAULT_EMBED": ALIAS,
        "EMBEDQ_DEVICE": "cpu",
        "EMBEDQ_DEVICE_LABEL": "cpu0",
    }
    module = "embedq.workers.worker" if is_named else "workers.worker"
    with Running([sys.executable, "-P", "-m", module], environment) as running:
        yield running


def _figures(name: str, starts: list[Start]) -> list[Figure]:
    def middle(attribute: str) -> float:
        return median(float(getattr(one, attribute)) for one in starts)

    imports_s = median(one.warm_s - one.loading_s for one in starts)
    told = "" if name == "this" else "other checkout: "
    return [
        Figure(f"{name}_imports_s", f"{told}imports and settings", imports_s, "s"),
        Figure(f"{name}_loading_s", f"{told}loading and warming up", middle("loading_s"), "s"),
        Figure(f"{name}_warm_s", f"{told}from start to warm", middle("warm_s"), "s"),
        Figure(f"{name}_ready_s", f"{told}from start to taking jobs", middle("ready_s"), "s"),
        Figure(
            f"{name}_answered_s",
            f"{told}from start to the first answer",
            middle("answered_s"),
            "s",
            _MOST_S if name == "this" else None,
            is_limit=True,
        ),
        Figure(f"{name}_cpu_s", f"{told}processor time until then", middle("cpu_s"), "s"),
        Figure(f"{name}_peak_mib", f"{told}memory until then", middle("peak_bytes") / 2**20, "MiB"),
    ]


def _ratio(seen: dict[str, list[Start]]) -> float:
    return median(one.cpu_s for one in seen["this"]) / median(one.cpu_s for one in seen["other"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench start", description=__doc__)
    parser.add_argument("--rounds", type=whole(), default=5, help="starts, of which the median counts (5)")
    parser.add_argument("--quick", action="store_true", help="one start, and none before it: shows that it runs")
    parser.add_argument("--against", type=Path, help="root of another checkout, whose workers take turns")
    parser.add_argument("--model", type=Path, help="directory of the model (all-MiniLM-L6-v2)")
    parser.add_argument("--precision", default="auto", help="the model's precision (auto)")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser
