"""The demo's dataset: docstrings as a Parquet file, a run in which a worker is killed, and searches in its result.

Needs the extra `datasets`, which the demo's brings. Imports `tasks`, as `steps` does.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from embedq import tasks
from embedq.core.errors import OperatorError
from embedq.deploy.demo import minilm
from embedq.deploy.demo.steps import QUERIES, Pool
from embedq.deploy.demo.texts import Text

#: Rows of the file, and of a part: small parts, so that the killed worker loses little on a slow machine.
_MAX_ROWS, _ROWS_PER_PART = 2_000, 100

#: Seconds that all of it may take, and between two looks.
_TIMEOUT_S, _LOOK_S = 600.0, 0.02


def dataset(texts: list[Text], pool: Pool, directory: Path, console: Console) -> None:
    """Write, embed, kill, verify, search; prints each step."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, target = directory / "docstrings.parquet", directory / "vectors"
    shutil.rmtree(target, ignore_errors=True)
    some = texts[:_MAX_ROWS]
    table = pa.table({"where": [one.where for one in some], "body": [one.text for one in some]})
    pq.write_table(table, source, row_group_size=_ROWS_PER_PART)
    run = tasks.datasets.embed(
        str(source),
        str(target),
        text="body",
        keep=["where"],
        model=minilm.ALIAS,
        rows_per_part=_ROWS_PER_PART,
        dtype="float16",
    )
    say = f"\ndataset  {len(some):,} rows of {source.name} in {len(run.manifest.parts)} parts are queued"
    console.print(say, highlight=False, soft_wrap=True)
    _kill_a_worker(run, pool, console)
    run.wait(_TIMEOUT_S)
    found = run.verify()
    if not found.is_whole or found.rows != len(some):
        raise OperatorError(f"the dataset in {target} is not whole: {found}")
    words = f"{found.rows:,} rows in {found.parts} parts are there, each once; {found.bytes:,} bytes in {target}"
    console.print(f"verified {words}", highlight=False, soft_wrap=True)
    _search(pq.read_table(target), console)


def _kill_a_worker(run: Any, pool: Pool, console: Console) -> None:
    """SIGKILL one of the demo's own workers as soon as it computes a part."""
    until_s, own = time.monotonic() + _TIMEOUT_S, _own_workers(pool)
    while not (workers := own & {one.worker for one in run.records().values() if one.state == "running"}):
        if time.monotonic() > until_s:
            raise OperatorError(f"no worker of the demo has begun a part of the dataset in {_TIMEOUT_S:.0f} s")
        time.sleep(_LOOK_S)
    worker = min(workers)
    os.kill(int(worker.rpartition("/")[2]), signal.SIGKILL)
    status = run.status()
    say = f"killed   {worker.partition('/')[0]}, with {status.parts.completed} of {status.parts.total} parts done"
    console.print(say, highlight=False, soft_wrap=True)


def _own_workers(pool: Pool) -> set[str]:
    """The demo's workers as records name them: a server that the user gave may have others, on other machines."""
    lines = pool.child.wait_for("action=worker_ready", pool.num_workers)
    named = ([line.partition(f"{name}=")[2].split()[0] for name in ("worker", "pid")] for line in lines)
    return {f"{worker}/{pid}" for worker, pid in named}


def _search(table: Any, console: Console) -> None:
    """The nearest row of each query, by numpy."""
    vectors = np.stack(table["dense"].to_numpy(zero_copy_only=False)).astype(np.float32)
    queries = tasks.embed.delay(list(QUERIES), input_type="query", model=minilm.ALIAS).get(timeout=_TIMEOUT_S).dense
    nearest = np.argmax(vectors @ queries.T, axis=0)
    for query, row in zip(QUERIES, nearest.tolist(), strict=True):
        console.print(f"search   “{query}”: {table['where'][row].as_py()}", highlight=False, soft_wrap=True)
