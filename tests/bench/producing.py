"""How many one-text jobs a producer sends per second: one by one, many at once, and with stock Celery."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import redis

from embedq import tasks
from embedq.tasks.models import Registry, Served
from tests.bench import stock

#: Jobs of one `embed_many`, for each that is sent one by one.
_MANY = 5

_SERVED = Served("costless", "/nowhere", ["embed"], stock.DIMENSIONS, 512, ["dense"], ["embed"])


def rates(url: str, num_jobs: int, num_rounds: int) -> dict[str, list[float]]:
    """Jobs per second of each round, by "delay", "embed_many" and "stock"; all three in each round.

    Nobody takes the jobs. The models are announced, as they are where workers run.
    """
    for app in (tasks.app, stock.app):
        app.conf.update(broker_url=url, result_backend=url)
    kinds: dict[str, tuple[int, Callable[[list[list[str]]], list[Any]]]] = {
        "delay": (num_jobs, lambda jobs: [tasks.embed.delay(texts) for texts in jobs]),
        "embed_many": (_MANY * num_jobs, tasks.embed_many),
        "stock": (num_jobs, lambda jobs: [stock.embed.delay(texts) for texts in jobs]),
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    with redis.Redis.from_url(url) as client:
        Registry(client).announce([_SERVED])
        for number in range(num_rounds + 1):
            for name, (count, send) in kinds.items():
                rate = _rate(send, list(_texts(count)))
                client.delete("embed", stock.QUEUE)
                if number:  # the first round opens the connections
                    found[name].append(rate)
    stock.app.close()
    return found


def _rate(send: Callable[[list[list[str]]], list[Any]], jobs: list[list[str]]) -> float:
    started_s = time.perf_counter()
    sent = send(jobs)
    seconds = time.perf_counter() - started_s
    for job in sent:  # as a producer that no longer wants them; not timed
        job.forget()
    return len(jobs) / seconds


def _texts(count: int) -> Iterator[list[str]]:
    return ([f"text {number:08d}"] for number in range(count))
