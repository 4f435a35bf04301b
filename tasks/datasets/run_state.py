"""A run's keys on the queue's server: who computes which part, and how fast. What is done, only the target says.

    embedq:dataset:<id>             hash    round, whether it was cancelled, when it began
    embedq:dataset:<id>:parts       hash    part -> JSON of `Record`
    embedq:dataset:<id>:sent        string  one bit for each part of this round whose job was queued
    embedq:dataset:<id>:claim:<n>   string  the job that computes part n now; gone some seconds after its worker

All of it may be lost: a run then counts as expired, and resuming it queues what the target does not have.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from embedq import __version__
from embedq.core.errors import ServerUnavailable

#: Seconds between two signs of life of a part that is being computed, and after which one without counts as dead.
BEAT_S = 2.0
MAX_SILENCE_S = 15.0

#: Seconds a run's keys are kept after the last that was heard of it.
_EXPIRES_S = 30 * 86_400

#: Seconds a starter may take for one write of jobs while others wait for it.
_STARTING_S = 60

#: Seconds between two looks of a starter that waits for another.
_LOOK_S = 0.1

#: What a part's record says of it.
RUNNING, DONE, FAILED = "running", "done", "failed"

#: Characters of an error that are kept.
_MAX_ERROR = 400


@dataclass(frozen=True, slots=True)
class Record:
    """The last state of one part that a worker has written."""

    state: str
    job: str = ""
    worker: str = ""
    #: By the server's clock: when the part was begun, and when this was written.
    began_s: float = 0.0
    told_s: float = 0.0
    #: Rows computed so far; at the end all of it.
    rows: int = 0
    failed: int = 0
    tokens: int = 0
    bytes: int = 0
    error: str = ""
    #: Of embedq, in that worker; empty where that is unknown.
    version: str = __version__


class RunState:
    """The keys of one run, on the connections of the producer's result backend. redis.RedisError where it is away."""

    def __init__(self, client: Any, prefix: str, manifest_id: str) -> None:
        self._client = client
        self._run = f"{prefix}embedq:dataset:{manifest_id}"
        self._parts, self._sent = f"{self._run}:parts", f"{self._run}:sent"

    def begin(self) -> int:
        """Mark the run as going on; a run without keys begins now. Returns its round."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hsetnx(self._run, "round", 1)
            pipe.hsetnx(self._run, "began_s", self.now_s())
            pipe.hdel(self._run, "cancelled")
            pipe.hget(self._run, "round")
            *_, found = pipe.execute()
        self._touch()
        return int(found)

    def next_round(self) -> int:
        """Begin a new round: no part of it is queued yet, and what waits of earlier rounds is passed over."""
        self.begin()
        with self._client.pipeline() as pipe:
            pipe.delete(self._sent)
            pipe.hincrby(self._run, "round", 1)
            return int(pipe.execute()[1])

    def cancel(self) -> None:
        """Mark the run as cancelled; workers drop its parts within two seconds."""
        self._client.hset(self._run, "cancelled", 1)
        self._touch()

    def known(self) -> dict[str, str]:
        """The run's own fields; empty without keys."""
        return {name.decode(): value.decode() for name, value in self._client.hgetall(self._run).items()}

    def unsent(self, numbers: Iterable[int]) -> list[int]:
        """Those parts whose jobs were not queued in this round."""
        bits = self._client.get(self._sent) or b""
        return [n for n in numbers if not (n >> 3 < len(bits) and bits[n >> 3] >> (7 - (n & 7)) & 1)]

    def mark_sent(self, numbers: Iterable[int]) -> None:
        """Note that the jobs of these parts were queued. After they were, so that none is left out."""
        with self._client.pipeline(transaction=False) as pipe:
            for number in numbers:
                pipe.setbit(self._sent, number, 1)
            pipe.expire(self._sent, _EXPIRES_S)
            pipe.execute()

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Let one starter at a time queue jobs; the next finds them queued. ServerUnavailable after a minute of waiting."""
        key, token = f"{self._run}:starting", secrets.token_hex(8)
        until_s = time.monotonic() + _STARTING_S
        while not self._client.set(key, token, nx=True, ex=_STARTING_S):
            if time.monotonic() > until_s:
                raise ServerUnavailable(
                    "another start of this dataset has been queueing its parts for a minute; try again"
                )
            time.sleep(_LOOK_S)
        try:
            yield
        finally:
            if self._client.get(key) == token.encode():
                self._client.delete(key)

    def is_starting(self) -> bool:
        """Returns True while somebody is queueing its parts."""
        return bool(self._client.exists(f"{self._run}:starting"))

    def claim(self, part: int, job: str) -> str | None:
        """Take a part for a job; the job that has it if that is another one, else None."""
        key = self._claim(part)
        if self._client.set(key, job, nx=True, px=int(MAX_SILENCE_S * 1000)):
            return None
        holder = (self._client.get(key) or b"").decode()
        return holder if holder and holder != job else None

    def release(self, part: int, record: Record | None) -> None:
        """Give up the claim of a part and write its last record; without one it will be tried again."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.delete(self._claim(part))
            if record:
                pipe.hset(self._parts, str(part), _written(record))
            pipe.execute()
        self._touch()

    def beat(self, records: dict[int, Record]) -> bool:
        """Write the records of running parts and renew their claims; returns whether the run was cancelled."""
        with self._client.pipeline(transaction=False) as pipe:
            for part, record in records.items():
                pipe.set(self._claim(part), record.job, px=int(MAX_SILENCE_S * 1000))
                pipe.hset(self._parts, str(part), _written(record))
            pipe.expire(self._parts, _EXPIRES_S)
            pipe.hget(self._run, "cancelled")
            cancelled = pipe.execute()[-1]
        return bool(cancelled)

    def record(self, part: int) -> Record | None:
        """The last record of a part; None without one."""
        return _read(self._client.hget(self._parts, str(part)))

    def records(self) -> dict[int, Record]:
        """The last record of every part that has one."""
        found = self._client.hgetall(self._parts)
        return {int(part): record for part, value in found.items() if part.isdigit() and (record := _read(value))}

    def forget_failures(self) -> None:
        """Remove the records of failed parts, because they are tried again."""
        failed = [str(part) for part, record in self.records().items() if record.state == FAILED]
        if failed:
            self._client.hdel(self._parts, *failed)

    def now_s(self) -> float:
        """The server's clock."""
        seconds, microseconds = self._client.time()
        return float(seconds) + float(microseconds) / 1e6

    def _claim(self, part: int) -> str:
        return f"{self._run}:claim:{part}"

    def _touch(self) -> None:
        with self._client.pipeline(transaction=False) as pipe:
            for key in (self._run, self._parts, self._sent):
                pipe.expire(key, _EXPIRES_S)
            pipe.execute()


def _written(record: Record) -> str:
    given = asdict(record) | {"error": record.error[:_MAX_ERROR]}
    return json.dumps({name: value for name, value in given.items() if value})


def _read(value: bytes | None) -> Record | None:
    try:
        given = json.loads(value or b"")
        known = {one.name: given[one.name] for one in fields(Record) if one.name in given}
        record = Record(**{"version": ""} | known)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    numbers = (record.began_s, record.told_s, record.rows, record.failed, record.tokens, record.bytes)
    texts = (record.state, record.job, record.worker, record.error, record.version)
    are_right = all(isinstance(one, int | float) for one in numbers) and all(isinstance(one, str) for one in texts)
    return record if are_right else None
