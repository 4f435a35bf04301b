"""`embedq exporter`: what waits in the queues, for Prometheus. One for each installation.

    lists of the queues     jobs by queue and priority, and when the next of them was sent
    unacked_index           jobs in flight
    embedq:models           which queues there are
    embedq:workers, :speeds how fast the workers present are (`tasks.speeds`)
    embedq:dead             dead letters

It only reads, at each scrape and only then, a number of keys that grows with the number of models: never a whole
message, and never all keys of the server. Results that wait for their producers are therefore not counted.
"""

from __future__ import annotations

import hashlib
import re
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import redis
from prometheus_client import CollectorRegistry

from embedq import tasks
from embedq.tasks.backlog_estimate import estimate
from embedq.tasks.dead import DeadLetters
from embedq.tasks.metrics import EXPORTER, Families
from embedq.tasks.models import Registry, queues_of
from embedq.tasks.scraping import Scraping
from embedq.tasks.server_errors import reaching_the_server
from embedq.tasks.speeds import Report, Speed, Speeds

#: Tokens that one worker is assumed to compute in a second, and a job to have, where no worker has ever measured: low
#: enough that a backlog is seen at once, and a finite number, because KEDA takes an infinite one for none.
UNMEASURED = Speed(1_000.0, {"any": 256.0})

#: Of each list its length, and the end of the message that is next: its properties stand there, behind a body that
#: may have megabytes. `ARGV[1]` bytes of it.
_TAILS = """
local found = {}
for number, key in ipairs(KEYS) do
  local next_message = redis.call('LINDEX', key, -1) or ''
  found[2 * number - 1], found[2 * number] = redis.call('LLEN', key), next_message:sub(-tonumber(ARGV[1]))
end
return found
"""

#: Properties take some three hundred bytes.
_TAIL_BYTES = 2048

_SENT = re.compile(rb'"timestamp": ([\d.]+)')


class FirstSeen:
    """Remembers since when a message is the next of its list, for messages without a time of sending."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[bytes, float]] = {}

    def age_s(self, key: str, tail: bytes, now_s: float) -> float:
        """Seconds since the message with this end was sent, or else since it was first seen here."""
        if not tail:
            self._since.pop(key, None)
            return 0.0
        if sent := _SENT.findall(tail):
            return max(0.0, now_s - float(sent[-1]))
        identity = hashlib.sha256(tail).digest()
        if self._since.get(key, (b"",))[0] != identity:
            self._since[key] = identity, now_s
        return now_s - self._since[key][1]


class QueueCollector:
    """Collects the metrics of one installation. If the server does not answer, the scrape fails, so that `up` is 0."""

    def __init__(self, client: Any, prefix: str, steps: list[int], separator: str) -> None:
        self._client = client
        self._prefix = prefix
        self._steps = steps
        self._separator = separator
        self._registry, self._speeds = Registry(client, prefix), Speeds(client, prefix)
        self._letters = DeadLetters(client, prefix)
        self._seen = FirstSeen()

    def describe(self) -> list[Any]:
        """The metrics without samples, without a call to the server."""
        return Families(EXPORTER).all()

    def collect(self) -> list[Any]:
        """The metrics with their present values."""
        families, models = Families(EXPORTER), self._registry.all()
        families.add_build()
        queues = queues_of(models)
        waiting = self._queues(families, list(queues))
        families.add("embedq_in_flight_jobs", self._client.zcard(f"{self._prefix}unacked_index"))
        families.add("embedq_dead_letters_kept", self._client.xlen(f"{self._prefix}embedq:dead"))
        families.add("embedq_dead_letters_total", self._letters.num_buried())
        reports, latest = list(self._speeds.present().values()), self._speeds.latest()
        for alias in models:
            families.add("embedq_workers", sum(alias in report.models for report in reports), model=alias)
        for alias, kind in dict.fromkeys(queues.values()):
            sizes = {queue: waiting[queue] for queue, of in queues.items() if of == (alias, kind)}
            num_tokens, seconds = backlog(sizes, alias, reports, latest.get(alias, Speed()))
            families.add("embedq_backlog_jobs", sum(sizes.values()), model=alias, kind=kind)
            families.add("embedq_backlog_tokens", num_tokens, model=alias, kind=kind)
            families.add("embedq_backlog_seconds", seconds, model=alias, kind=kind)
        return families.all()

    def _queues(self, families: Families, queues: list[str]) -> dict[str, int]:
        """Jobs in each queue, all lists read in one call."""
        keys = [self._key(queue, step) for queue in queues for step in self._steps]
        found = self._tails(keys)
        now_s, sizes = time.time(), {}
        for number, queue in enumerate(queues):
            size, age_s = 0, 0.0
            for offset, step in enumerate(self._steps):
                place = number * len(self._steps) + offset
                num_jobs, tail = found[2 * place : 2 * place + 2]
                families.add("embedq_queue_jobs", num_jobs, queue=queue, priority=str(step))
                size, age_s = size + num_jobs, max(age_s, self._seen.age_s(keys[place], tail, now_s))
            families.add("embedq_oldest_job_age_seconds", age_s, queue=queue)
            sizes[queue] = size
        return sizes

    def _tails(self, keys: list[str]) -> list[Any]:
        """The length of each list and the end of its next message, read in one call.

        The script cannot write, so that a user of the server who may only read may be allowed it; servers before 7.0
        know no such scripts.
        """
        arguments = (_TAILS, len(keys), *keys, _TAIL_BYTES)
        try:
            return list(self._client.execute_command("EVAL_RO", *arguments))
        except redis.ResponseError as error:
            if "unknown command" not in str(error):
                raise
        return list(self._client.eval(*arguments))

    def _key(self, queue: str, step: int) -> str:
        return f"{self._prefix}{queue}{self._separator}{step}" if step else f"{self._prefix}{queue}"


def backlog(queued: Mapping[str, int], alias: str, reports: list[Report], latest: Speed) -> tuple[float, float]:
    """(tokens, seconds) of the jobs in the queues of one model: by the speed of the workers present.

    Without any, the seconds that one worker would take at the speed last measured: more than 0 as long as a job
    waits, and never infinite. A worker present that has not measured yet counts as fast as the others.
    """
    workers = [report.models[alias] for report in reports if alias in report.models]
    found = estimate(queued, workers, latest, UNMEASURED)
    return (found.num_tokens, found.seconds(max(1, len(workers)))) if found else (0.0, 0.0)


def run(host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C. ServerUnavailable if Redis cannot be reached."""
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    with reaching_the_server(), tasks.app.connection_for_read() as connection:
        channel = connection.channel()
        client = redis.Redis(connection_pool=channel.pool)
        collector = QueueCollector(client, channel.global_keyprefix, channel.priority_steps, channel.sep)
        registry = CollectorRegistry()
        registry.register(collector)
        with Scraping(host, port, registry, {"/healthz/live": _alive, "/healthz/ready": _reaching(client)}) as scraping:
            print(f"metrics of the queues at http://{host}:{scraping.port}/metrics", flush=True)
            over.wait()


def _alive() -> tuple[bool, str]:
    return True, "serving"


def _reaching(client: Any) -> Callable[[], tuple[bool, str]]:
    def ready() -> tuple[bool, str]:
        try:
            client.ping()
        except (redis.RedisError, OSError) as error:
            return False, f"the server does not answer: {type(error).__name__}"
        return True, "reading"

    return ready
