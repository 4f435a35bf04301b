"""The steps of the demo, each of which prints what it did.

Imports `tasks`, which reads the environment: whoever imports this has set it before.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import celery.exceptions
import numpy as np
import redis
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text as Plain

from embedq import tasks
from embedq.core.errors import OperatorError, ServerUnavailable
from embedq.deploy import flower
from embedq.deploy.demo import minilm
from embedq.deploy.demo.running import Child, Running
from embedq.deploy.demo.texts import Text
from embedq.workers import embedded
from embedq.workers.logs import without_password

#: Questions that the standard library answers.
QUERIES = (
    "How can I run another program and read its output?",
    "How can I compare two texts line by line?",
    "How do I call a function after a delay?",
)

#: Texts of one job: enough that a job's overhead vanishes, few enough for steady progress.
_TEXTS_PER_JOB = 256

#: Jobs sent ahead of the answers, per worker: it never runs dry, and after a Ctrl-C it has only
#: these few to finish.
_JOBS_AHEAD = 3

#: Bulk work gives way to whatever else is in the queue.
_BULK_PRIORITY = 9

#: Passages that each query is ranked against, and how many of them are shown.
_NUM_CANDIDATES, _NUM_HITS = 50, 4

#: Workers end by themselves within their own drain timeout of 60 s; this is for a launcher that does not.
_DRAIN_TIMEOUT_S = 90.0

#: Seconds without an answer after which the demo gives up, and between two looks at the workers.
_TIMEOUT_S, _CHECK_S = 300.0, 1.0


@dataclass(frozen=True)
class Pool:
    """The workers and how many there are."""

    child: Child
    num_workers: int


def start_server(running: Running, console: Console) -> str:
    """The server the user named, else an embedded one; returns its URL."""
    url: str = tasks.config.redis_url()
    if tasks.config.is_server_named():
        if not embedded.answers(url):
            raise ServerUnavailable(f"no server answers at {without_password(url)}; start it, or unset its variable")
    elif tasks.config.url_file().exists() and embedded.answers(url):
        raise OperatorError(
            f"a demo is running in {tasks.config.data_dir().parent} already; stop it with Ctrl-C, or start this one elsewhere"
        )
    else:
        url = running.start(embedded.server())
    # `tasks` was imported before the server had a URL.
    tasks.app.conf.update(broker_url=url, result_backend=url)
    running.callback(_abandon_results)
    _forget_at_the_end(running)
    console.print(f"server   {without_password(url)}", highlight=False)
    return url


def start_workers(running: Running, directory: Path, url: str) -> Child:
    """`embedq workers`: one worker per accelerator, or one on the CPU. They are not ready yet."""
    command, environment = [sys.executable, "-m", "embedq.workers"], {"EMBEDQ_REDIS_URL": url}
    return running.start(Child("the workers", command, directory / "workers.log", environment, _DRAIN_TIMEOUT_S))


def start_flower(running: Running, directory: Path, url: str, console: Console) -> str:
    """Flower on a free port; returns its address, once it listens."""
    command, environment = flower.command(port=0), {"EMBEDQ_REDIS_URL": url, **flower.OPEN}
    child = running.start(Child("Flower", command, directory / "flower.log", environment, flower.STOP_TIMEOUT_S))
    address = child.wait_for(flower.READY)[0].rpartition(" ")[2]
    console.print(f"Flower   {address}", highlight=False)
    return address


def wait_for_workers(child: Child, console: Console) -> Pool:
    """Wait until every worker has loaded and warmed up its model."""
    with console.status("the workers load and warm up the model"):
        launching = child.wait_for("action=launching")[0]
        num_workers = int(launching.partition("num_workers=")[2].split()[0])
        for line in child.wait_for("action=worker_ready", num_workers):
            console.print(f"worker   {line.partition('worker=')[2].split()[0]} is ready", highlight=False)
    return Pool(child, num_workers)


def embed(texts: list[Text], pool: Pool, running: Running, console: Console) -> tuple[np.ndarray, str]:
    """Send the texts through the queue in jobs; returns vectors (num_texts, dim) and the last job's id."""
    rows: list[np.ndarray] = []
    job_id = ""
    console.print(f"\nembedding {len(texts):,} texts in jobs of {_TEXTS_PER_JOB}", highlight=False)
    started_s = time.monotonic()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=len(texts), rate="")
        for job in _jobs_in_order(texts, pool):
            running.check()
            rows.extend(_answer(job, pool).dense)
            job_id = job.id
            rate = f"{len(rows) / (time.monotonic() - started_s):,.0f} texts/s"
            progress.update(bar, completed=len(rows), rate=rate)
            if not console.is_terminal:  # there the bar is not drawn
                console.print(f"embedded {len(rows):,} of {len(texts):,} texts, {rate}", highlight=False)
    seconds = time.monotonic() - started_s
    summary = f"{len(rows):,} texts in {seconds:.1f} s: {len(rows) / seconds:,.0f} texts/s"
    console.print(summary, style="bold", highlight=False)
    return np.stack(rows), job_id


def _jobs_in_order(texts: list[Text], pool: Pool) -> Iterator[Any]:
    """Send jobs ahead of the answers, and give each job when it is the next to be answered."""
    waiting: deque[Any] = deque()
    for start in range(0, len(texts), _TEXTS_PER_JOB):
        part = [text.text for text in texts[start : start + _TEXTS_PER_JOB]]
        waiting.append(tasks.embed.apply_async((part,), priority=_BULK_PRIORITY))
        if len(waiting) >= _JOBS_AHEAD * pool.num_workers:
            yield waiting.popleft()
    while waiting:
        yield waiting.popleft()


def rerank(query: str, texts: list[Text], vectors: np.ndarray, pool: Pool, console: Console) -> None:
    """Print the best of the texts: found by cosine with the query, then ranked by their tokens' vectors."""
    vector = _answer(tasks.embed.delay([query], input_type="query"), pool).dense[0]
    nearest = np.argsort(-(vectors @ vector), kind="stable")[:_NUM_CANDIDATES]  # all have length 1
    passages = [texts[index].text for index in nearest]
    ranking = _answer(tasks.rerank.delay(query, passages, mode="colbert", top_k=_NUM_HITS), pool)
    table = Table(title=f"“{query}”", title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("where", no_wrap=True, overflow="ellipsis", max_width=32)
    table.add_column("first line")
    for index, score in ranking:
        hit = texts[nearest[index]]
        table.add_row(f"{score:.3f}", Plain(hit.where), Plain(hit.first_line, no_wrap=True, overflow="ellipsis"))
    console.print()
    console.print(table)


def report(job_id: str, url: str, address: str | None, console: Console) -> None:
    """Print where the results are and where to look at the jobs; `address` is Flower's if it stays."""
    key = f"celery-task-meta-{job_id}"
    num_bytes = tasks.app.backend.client.strlen(key)
    console.print()
    for line in (
        f"blobs    msgpack at celery-task-meta-<job id> in {without_password(url)}",
        f"         for example {key}, {num_bytes:,} bytes",
        f"Flower   {address}"
        if address
        else "Flower   showed all of it while it ran; KEEP=1, or --keep, leaves it running",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def stay(pool: Pool, console: Console) -> None:
    """Say how another shell uses what runs here, and stay until a signal arrives or the workers end."""
    if tasks.config.is_server_named():
        setting = "EMBEDQ_REDIS_URL=<the URL you gave>"
    else:  # its URL holds a password; producers find it in a file that only this user can read
        setting = f"EMBEDQ_DATA_DIR={shlex.quote(str(tasks.config.data_dir()))}"
    call = "import tasks; print(tasks.embed.delay(['a text']).get(timeout=30))"
    lines = (
        "",
        "It stays up until Ctrl-C. From another shell, in this directory:",
        f"    export {setting}",
        f'    {shlex.quote(sys.executable)} -c "{call}"',
    )
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    pool.child.wait()


def _answer(job: Any, pool: Pool) -> Any:
    """The job's result. OperatorError if the workers end, or no answer comes."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < deadline_s:
        with contextlib.suppress(celery.exceptions.TimeoutError):
            return job.get(timeout=_CHECK_S)
        pool.child.check()
    raise OperatorError(f"a job had no answer for {_TIMEOUT_S:.0f} s; the workers' log is {pool.child.log}")


def _abandon_results() -> None:
    """Wait for no result any more: one that is dropped when the server is gone would look for it for many seconds."""
    tasks.app.backend.result_consumer.subscribed_to.clear()
    tasks.app.close()


def _forget_at_the_end(running: Running) -> None:
    """Withdraw the demo's model once its workers are gone; on a server of the user's, nobody else will."""

    def forget() -> None:
        with contextlib.suppress(redis.RedisError):
            tasks.embed.registry.forget(minilm.ALIAS)

    if minilm.ALIAS not in tasks.embed.registry.all():
        running.callback(forget)
