"""Producers that never stop sending, and a count of the results that were published.

Each job embeds its own id, so that everything about it can be found by that one word. A call that
raises because the server is away is made again with the same id, as a user's would who must not lose
the job: the job of the first call may be in the queue, and both have one result.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from types import TracebackType

import redis
from kombu.exceptions import OperationalError
from kombu.utils.uuid import uuid

from embedq import tasks

#: Jobs sent and not answered at any moment: more than all workers hold, so that some wait.
MAX_OUTSTANDING = 400

#: Seconds before a call that failed is made again, and before a broken subscription is renewed.
_PAUSE_S = 0.1

_CHANNEL = "celery-task-meta-"

#: First bytes of a blob, which name the job's state.
_HEAD_BYTES = 64


class Answers:
    """Which jobs have a result, and how often each result was published; a thread of its own."""

    def __init__(self, url: str) -> None:
        self.num_published: Counter[str] = Counter()
        self.known: set[str] = set()
        self.changed = threading.Condition()
        self._client = redis.Redis.from_url(url)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="answers of the load", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._client.close()

    def look_for(self, ids: list[str]) -> None:
        """Ask the server for results whose news was missed while the subscription was broken."""
        missing = [job_id for job_id in ids if job_id not in self.known]
        found = {job_id for job_id in missing if _is_answer(self._client.getrange(_CHANNEL + job_id, 0, _HEAD_BYTES))}
        with self.changed:
            self.known |= found
            self.changed.notify_all()

    def _run(self) -> None:
        while not self._is_over.is_set():
            with contextlib.suppress(redis.RedisError, OSError), self._client.pubsub() as news:
                news.psubscribe(_CHANNEL + "*")
                while not self._is_over.is_set():
                    self._note(news.get_message(ignore_subscribe_messages=True, timeout=0.2))
            self._is_over.wait(_PAUSE_S)

    def _note(self, message: dict | None) -> None:
        if message is None or not _is_answer(message["data"]):
            return
        job_id = message["channel"].decode().removeprefix(_CHANNEL)
        with self.changed:
            self.num_published[job_id] += 1
            self.known.add(job_id)
            self.changed.notify_all()


def _is_answer(blob: bytes) -> bool:
    """Returns True for a result, False for nothing and for the report of a job that has started."""
    return bool(blob) and b"STARTED" not in blob[:_HEAD_BYTES]


class Load:
    """Sends jobs from several threads for as long as the block lasts. A context manager."""

    def __init__(self, answers: Answers, num_threads: int = 2) -> None:
        self._answers = answers
        self._is_over = threading.Event()
        #: Ids of the jobs whose call has returned.
        self.sent: list[str] = []
        #: Ids of the jobs of which a call has raised, once for each time.
        self.raised: list[str] = []
        self._threads = [threading.Thread(target=self._run, name=f"load-{n}", daemon=True) for n in range(num_threads)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        with self._answers.changed:
            self._answers.changed.notify_all()
        for thread in self._threads:
            thread.join()

    @property
    def num_outstanding(self) -> int:
        return len(self.sent) - len(self._answers.known)

    def _run(self) -> None:
        while not self._is_over.is_set():
            with self._answers.changed:
                has_room = self._answers.changed.wait_for(self._may_send, timeout=2.0)
            if has_room:
                self._send(uuid())
            else:
                with contextlib.suppress(redis.RedisError, OSError):
                    self._answers.look_for(self.sent[-2 * MAX_OUTSTANDING :])

    def _may_send(self) -> bool:
        return self.num_outstanding < MAX_OUTSTANDING or self._is_over.is_set()

    def _send(self, job_id: str) -> None:
        while not self._is_over.is_set():
            try:
                tasks.embed.apply_async(([job_id],), task_id=job_id)
            except OperationalError:
                self.raised.append(job_id)
                self._is_over.wait(_PAUSE_S)
            else:
                self.sent.append(job_id)
                return


def wait_for_answers(answers: Answers, ids: list[str], timeout_s: float) -> set[str]:
    """Wait until each of these jobs has a result; returns those that have none in the end."""
    deadline_s = time.monotonic() + timeout_s
    wanted = set(ids)
    while (missing := wanted - answers.known) and time.monotonic() < deadline_s:
        answers.look_for(sorted(missing))
        with answers.changed:
            answers.changed.wait_for(lambda: wanted <= answers.known, timeout=1.0)
    return missing
