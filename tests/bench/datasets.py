"""`python -m tests.bench datasets`: a dataset through a worker against its engine alone; memory; neighbours; planning.

rows/s       real docstrings, told apart by a number, as one Parquet file; against jobs of 256 through the same
             engine in a process of its own, in the same run
memory       the worker's peak after a small and after the whole dataset; the server's peak
neighbours   interactive reranks beside a dataset, and beside a queue of bulk jobs
planning     millions of rows planned, queued and looked at, without a model
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from embedq import core, tasks
from embedq.core.settings import Precision
from embedq.deploy.demo import minilm
from embedq.tasks.models import Served
from tests.bench import real_texts, report, usage
from tests.bench.arguments import whole
from tests.bench.report import Figure
from tests.bench.running import ALIAS, BULK_PRIORITY, Subject, Worker, server, worker

_TEXTS_PER_JOB = 256

#: Jobs of the engine alone that are under way: as many as fill a worker's window.
_UNDER_WAY = 16

_ROWS_PER_PART = 5_000

_TIMEOUT_S = 3_000.0

_MIB = 1024**2

#: Docstrings read; a number behind each makes as many texts as are wanted.
_NUM_DOCSTRINGS = 5_000

#: Passages of an interactive rerank, and reranks measured.
_PASSAGES, _NUM_RERANKS = 8, 60


def main(arguments: list[str]) -> int:
    """Measure, print the table, write the JSON; returns the exit code."""
    given = _parser().parse_args(arguments)
    if given.alone:
        print(*_alone(given.model or minilm.directory(), given.rows, given.precision))
        return 0
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="embedq-bench-") as folder:
        if given.rows:
            figures += _computing(given, Path(folder))
        if given.plan:
            figures += _planning(given.plan, Path(folder))
    report.show(f"{given.rows:,} rows computed, {given.plan:,} planned", figures)
    if given.json:
        report.write(given.json, {"command": "datasets", "arguments": arguments}, figures)
    return 0


def texts_of(num_rows: int, model: Path) -> list[str]:
    """Docstrings, all different."""
    some = real_texts.read(min(_NUM_DOCSTRINGS, num_rows), model).mixed
    return [f"{row} {some[row % len(some)]}" for row in range(num_rows)]


def _computing(given: Any, folder: Path) -> list[Figure]:
    model = given.model or minilm.directory()
    subject = Subject(model, precision=given.precision, settings={"data_roots": str(folder)})
    texts = texts_of(given.rows, model)
    pq.write_table(pa.table({"id": range(len(texts)), "body": texts}), folder / "rows.parquet", row_group_size=1000)
    small = given.rows // 10
    pq.write_table(pa.table({"id": range(small), "body": texts[:small]}), folder / "small.parquet", row_group_size=1000)
    with server() as url, worker(subject, url) as running:
        _dataset(folder, "small.parquet", "small", given.rows)
        peak_small = usage.peak_bytes(running.pid)
        alone = [_engine_alone(given, model)]
        cpu_before_s = usage.cpu_s(running.pid)
        seconds = _dataset(folder, "rows.parquet", "all", given.rows)
        cpu_s = usage.cpu_s(running.pid) - cpu_before_s
        alone.append(_engine_alone(given, model))
        peak_all = usage.peak_bytes(running.pid)
        server_peak = int(running.client.info("memory")["used_memory_peak"])
        neighbours = _neighbours(running, folder, texts)
    speed, engine = given.rows / seconds, statistics.mean(rows_s for rows_s, _ in alone)
    engine_cpu_s = statistics.mean(one_s for _, one_s in alone)
    return [
        Figure("rows_s", f"dataset of {given.rows:,} rows", speed, "rows/s"),
        Figure("engine_rows_s", "the same through the engine alone, mean of before and after", engine, "rows/s"),
        Figure("share", "dataset's speed, of the engine's alone", speed / engine, "", 0.97),
        # What a neighbour on the machine takes does not count here; idle time does not, either.
        Figure("cpu_share", "engine's processor time for it, of the worker's for the dataset", engine_cpu_s / cpu_s, "", 0.97),
        Figure("peak_small_mib", f"worker's peak after {small:,} rows", peak_small / _MIB, "MiB"),
        Figure("growth_mib", f"its growth by {given.rows:,} rows", (peak_all - peak_small) / _MIB, "MiB", 50, is_limit=True),
        Figure("server_peak_mib", "server's peak", server_peak / _MIB, "MiB", 20, is_limit=True),
        *neighbours,
    ]  # fmt: skip


def _dataset(folder: Path, source: str, target: str, num_rows: int) -> float:
    """Seconds from the call to the last part."""
    seconds, microseconds = tasks.app.backend.client.time()
    begun_s = seconds + microseconds / 1e6  # by the server's clock, as workers tell of parts
    given: dict[str, Any] = {"text": "body", "keep": ["id"], "model": ALIAS}
    given["rows_per_part"] = min(
        _ROWS_PER_PART, max(1, num_rows // 5)
    )  # small enough that the last is none of the time
    run = tasks.datasets.embed(str(folder / source), str(folder / target), **given)
    status = run.wait(_TIMEOUT_S)
    assert status.failed_rows == 0
    return max(record.told_s for record in run.records().values()) - begun_s


def _engine_alone(given: Any, model: Path) -> tuple[float, float]:
    """(rows per second, processor seconds) of jobs of 256 in a process that has nothing but the engine."""
    command = [
        sys.executable,
        "-m",
        "tests.bench",
        "datasets",
        "--alone",
        "--rows",
        str(given.rows),
        "--model",
        str(model),
    ]
    done = subprocess.run([*command, "--precision", given.precision], capture_output=True, text=True, check=True)
    rows_s, cpu_s = done.stdout.split()[-2:]
    return float(rows_s), float(cpu_s)


def _alone(model: Path, num_rows: int, precision: str) -> tuple[float, float]:
    texts = texts_of(num_rows, model)
    jobs = [texts[start : start + _TEXTS_PER_JOB] for start in range(0, num_rows, _TEXTS_PER_JOB)]
    with core.load(
        str(model), device="cpu", precision=cast(Precision, precision), model={"max_length": real_texts.MAX_TOKENS}
    ) as engine:
        engine.warm_up()
        begun_s, cpu_begun_s, under_way = time.perf_counter(), time.process_time(), deque[Any]()
        for job in jobs:
            under_way.append(engine.submit(partial(engine.calls.embed, job), BULK_PRIORITY, sum(map(len, job))))
            if len(under_way) == _UNDER_WAY:
                under_way.popleft().answer.result()
        for one in under_way:
            one.answer.result()
        return num_rows / (time.perf_counter() - begun_s), time.process_time() - cpu_begun_s


def _neighbours(running: Worker, folder: Path, texts: list[str]) -> list[Figure]:
    """Half and 95 of 100 of the seconds of a rerank beside each kind of bulk work."""
    passages = texts[:_PASSAGES]

    def dataset() -> None:
        _dataset(folder, "rows.parquet", f"beside-{time.monotonic_ns()}", len(texts))

    def jobs() -> None:
        lots = [texts[start : start + _TEXTS_PER_JOB] for start in range(0, len(texts), _TEXTS_PER_JOB)]
        for job in tasks.embed_many(lots, {"priority": BULK_PRIORITY}, model=ALIAS):
            job.get(timeout=_TIMEOUT_S)
            job.forget()

    beside = {"dataset": _beside(dataset, passages), "jobs": _beside(jobs, passages)}
    ratio = statistics.median(beside["dataset"]) / statistics.median(beside["jobs"])
    figures = [
        Figure(f"rerank_{name}_{part}", f"rerank of {_PASSAGES} beside {name}, {part} of 100", value * 1000, "ms")
        for name, seconds in beside.items()
        for part, value in ((50, statistics.median(seconds)), (95, sorted(seconds)[int(len(seconds) * 0.95)]))
    ]
    return [*figures, Figure("rerank_ratio", "half of the reranks: beside a dataset, of beside bulk jobs", ratio, "")]


def _beside(work: Callable[[], None], passages: list[str]) -> list[float]:
    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(1.0)  # until the worker is in the middle of it
    seconds: list[float] = []
    while thread.is_alive() and len(seconds) < _NUM_RERANKS:
        begun_s = time.perf_counter()
        tasks.rerank.delay("which of them is it?", passages, model=ALIAS).get(timeout=_TIMEOUT_S)
        seconds.append(time.perf_counter() - begun_s)
    thread.join()
    assert seconds, "the work was over before anything was measured beside it"
    return seconds


def _planning(num_rows: int, folder: Path) -> list[Figure]:
    """Plan, queue and look at rows that nobody computes."""
    source = folder / "many"
    source.mkdir()
    num_files, per_file = 50, -(-num_rows // 50)
    column = pa.array([f"row {row}" for row in range(per_file)])
    for number in range(num_files):
        table = pa.table({"id": range(number * per_file, (number + 1) * per_file), "body": column})
        pq.write_table(table, source / f"{number:03d}.parquet", row_group_size=20_000)
    with server():
        tasks.embed.registry.announce([Served("none", "/nowhere", ["embed"], 384, 256, ["dense"], [])])
        client = tasks.app.backend.client
        before = int(client.info("memory")["used_memory"])
        begun_s = time.perf_counter()
        run = tasks.datasets.embed(str(source), str(folder / "target"), text="body", keep=["id"], model="none")
        queued_s = time.perf_counter() - begun_s
        begun_s = time.perf_counter()
        status = run.status()
        status_s = time.perf_counter() - begun_s
        taken = int(client.info("memory")["used_memory"]) - before
    manifest = (folder / "target" / "_embedq" / "manifest.json").stat().st_size
    return [
        Figure("plan_rows", "rows planned", status.rows.total, "rows"),
        Figure("plan_parts", "parts queued", status.parts.waiting, "parts"),
        Figure("plan_s", "planned and queued in", queued_s, "s"),
        Figure("status_s", "status in", status_s, "s"),
        Figure("plan_server_mib", "server's memory for it", taken / _MIB, "MiB", 20, is_limit=True),
        Figure("plan_manifest_mib", "manifest", manifest / _MIB, "MiB"),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench datasets", description=__doc__)
    parser.add_argument("--rows", type=whole(0), default=50_000, help="rows computed; 0 for none (%(default)s)")
    parser.add_argument("--plan", type=whole(0), default=10_000_000, help="rows planned; 0 for none (%(default)s)")
    parser.add_argument("--model", type=Path, help="a model directory (MiniLM)")
    parser.add_argument("--precision", default="auto", help="as the setting (auto)")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser
