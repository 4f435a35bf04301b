"""One worker, ours or stock, and how fast it empties a queue that was filled beforehand.

The queue appears at once: its messages are sent to another list, which is then renamed. While the
worker runs, this process asks the server every few milliseconds how many jobs wait and are held.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import redis
from celery import Celery

from embedq import tasks
from tests.bench import stock, usage
from tests.bench.usage import ServerUse
from tests.running import Running

#: Where messages wait until they are let go.
_STAGE = "stage"

#: Between two looks at the server, and seconds after which the worker has stopped.
_LOOK_S, _TIMEOUT_S = 0.005, 300.0

#: Commands of this process while a queue is emptied; workers do not use them.
_OUR_CALLS = frozenset({"llen", "hlen", "exists", "rename", "info"})

#: Keys asked for in one call.
_MAX_KEYS = 1_000

#: So that no two texts of a run are equal: the engine would compute them once.
_number = itertools.count()


def next_text() -> str:
    """A short text that no other job of this process has."""
    return f"text {next(_number):08d}"


@dataclass(frozen=True)
class Kind:
    """A worker to be measured."""

    name: str
    #: What starts it, and the line that it prints once it takes jobs.
    command: tuple[str, ...]
    ready: str
    task: str
    queue: str


OURS = Kind("ours", (sys.executable, "-m", "tests.bench.costless"), "action=worker_ready", "tasks.embed", "embed")


def stock_kind(pool: str, concurrency: int, prefetch_multiplier: int) -> Kind:
    """A stock worker with one of Celery's pools."""
    start = f"{sys.executable} -m celery -A tests.bench.stock worker --loglevel WARNING -E"
    sizes = f"--pool {pool} --concurrency {concurrency} --prefetch-multiplier {prefetch_multiplier}"
    command = f"{start} {sizes} --without-gossip --without-mingle --heartbeat-interval 5"
    name = f"stock {pool} -c {concurrency}, {concurrency * prefetch_multiplier} prefetched"
    return Kind(name, tuple(command.split()), "stock worker is ready", stock.TASK, stock.QUEUE)


@dataclass(frozen=True)
class Drained:
    """What one queue cost."""

    num_jobs: int
    seconds: float
    worker_cpu_s: float
    #: By the name of the thread, where the worker tells them.
    thread_cpu_s: dict[str, float]
    server: ServerUse

    @property
    def jobs_per_s(self) -> float:
        return self.num_jobs / self.seconds

    def each_us(self, seconds: float) -> float:
        """Microseconds for each job."""
        return seconds / self.num_jobs * 1e6


@dataclass
class Subject:
    """A running worker, and a database of the server for it alone."""

    kind: Kind
    running: Running
    client: redis.Redis
    sender: Celery
    threads: dict[int, str] = field(default_factory=dict)

    def wait_until_ready(self) -> None:
        """Return once it takes jobs."""
        self.running.wait_for(self.kind.ready)
        lines = [line for line in self.running.output.splitlines() if "action=thread" in line]
        self.threads |= {int(_field(line, "id")): _field(line, "name_of") for line in lines}
        assert self.threads or self.kind is not OURS, "the worker has named none of its threads"

    def drain(self, num_jobs: int) -> Drained:
        """Let the worker do `num_jobs` jobs of one text."""
        keys = self._fill(num_jobs)
        pid = self.running.process.pid
        cpu_s, threads_s, server = usage.cpu_s(pid), usage.thread_cpu_s(pid), usage.server_use(self.client)
        started_s = time.monotonic()
        self.client.rename(_STAGE, self.kind.queue)
        num_looks = self._wait(keys, started_s + _TIMEOUT_S)
        seconds = time.monotonic() - started_s
        used = usage.server_use(self.client) - server
        # Without our own looks, the renaming, and the two times that we asked what it has used.
        calls = {name: number for name, number in used.calls.items() if name not in _OUR_CALLS}
        used = ServerUse(used.cpu_s, used.num_reads - num_looks - 4, calls)
        threads = {
            self.threads[tid]: end_s - threads_s.get(tid, 0.0)
            for tid, end_s in usage.thread_cpu_s(pid).items()
            if tid in self.threads
        }
        drained = Drained(num_jobs, seconds, usage.cpu_s(pid) - cpu_s, threads, used)
        self._forget(keys)
        return drained

    def _fill(self, num_jobs: int) -> list[str]:
        """Let as many messages wait beside the queue; returns the keys of their results."""
        options = {"argsrepr": "1 text, 13 characters", "kwargsrepr": "{}", "queue": _STAGE}
        with self.sender.producer_pool.acquire(block=True) as producer, producer.batch(max_size=500):
            texts = ([next_text()] for _ in range(num_jobs))
            jobs = [self.sender.send_task(self.kind.task, args=[text], producer=producer, **options) for text in texts]
        return [f"celery-task-meta-{job.id}" for job in jobs]

    def _wait(self, ids: list[str], deadline_s: float) -> int:
        """Wait until no job waits or is held; returns how often the server was asked."""
        num_looks = 0
        while True:
            num_looks += 1
            with self.client.pipeline(transaction=False) as both:
                is_over = not any(both.llen(self.kind.queue).hlen("unacked").execute())
            if is_over:  # or a stock worker has taken a job and not yet recorded that
                num_looks += 1
                if int(self.client.exists(*ids[-_MAX_KEYS:])) == len(ids[-_MAX_KEYS:]):
                    return num_looks
            if time.monotonic() > deadline_s:
                last = "\n".join(self.running.lines[-9:])
                raise TimeoutError(f"{self.kind.name} has stopped; its output ends:\n{last}")
            time.sleep(_LOOK_S)

    def _forget(self, ids: list[str]) -> None:
        """Drop the results. AssertionError if one is missing."""
        parts = [ids[begin : begin + _MAX_KEYS] for begin in range(0, len(ids), _MAX_KEYS)]
        num_found = sum(int(self.client.unlink(*part)) for part in parts)
        assert num_found == len(ids), f"{self.kind.name} has {num_found:,} results of {len(ids):,} jobs"


@contextmanager
def running(kind: Kind, url: str, database: int, through_port: int | None = None) -> Iterator[Subject]:
    """Start a worker of that kind on a database of its own, reached through another port if one is given.

    `Subject.wait_until_ready` tells when it takes jobs: several can so start at once.
    """
    own = _with(url, database)
    sender = Celery("bench", broker=own, backend="disabled://", set_as_current=False)
    sender.conf.update(broker_transport_options=tasks.config.broker_transport_options, task_serializer="embedq")
    environment = {"EMBEDQ_REDIS_URL": _with(url, database, through_port)}
    with Running(kind.command, environment) as started, redis.Redis.from_url(own) as client:
        try:
            yield Subject(kind, started, client, sender)
        finally:
            sender.close()


def _with(url: str, database: int, port: int | None = None) -> str:
    place = url.rpartition("/")[0]
    if port is not None:
        place = f"{place.rpartition(':')[0]}:{port}"
    return f"{place}/{database}"


def _field(line: str, name: str) -> str:
    return line.partition(f" {name}=")[2].split()[0]
