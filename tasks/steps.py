"""Runs an exchange with the server that is written once, blocking or in asyncio.

An exchange is a generator: it yields a call of a Redis client, and is sent what the server answered; or it yields seconds
to pause. What it returns is the result.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from typing import Any, TypeAlias, TypeVar

import redis
from celery import Celery

from embedq.core.errors import ServerUnavailable
from embedq.tasks.awaiting import make_clients

_Result = TypeVar("_Result")

#: What is to be done next.
Step: TypeAlias = Callable[[Any], Any] | float

Exchange: TypeAlias = Generator[Step, Any, _Result]


def run(app: Celery, exchange: Exchange[_Result], failed: str) -> _Result:
    """Run it on the connections of the result backend. ServerUnavailable, with `failed` said first, if the server fails."""
    client = app.backend.client
    answer: Any = None
    try:
        while True:
            step = _next(exchange, answer)
            if isinstance(step, float):
                time.sleep(step)
                continue
            try:
                answer = step(client)
            except redis.exceptions.NoPermissionError as error:
                answer = error
    except StopIteration as end:
        result: _Result = end.value
        return result
    except redis.RedisError as error:
        raise _unavailable(failed, error) from error


async def arun(app: Celery, exchange: Exchange[_Result], failed: str) -> _Result:
    """As `run`, on a connection of the running event loop."""
    clients = make_clients(app.backend)
    answer: Any = None
    try:
        while True:
            step = _next(exchange, answer)
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            try:
                answer = await step(clients[0])
            except redis.exceptions.NoPermissionError as error:
                answer = error
    except StopIteration as end:
        result: _Result = end.value
        return result
    except redis.RedisError as error:
        raise _unavailable(failed, error) from error
    finally:
        for client in clients:
            await client.aclose()


def _next(exchange: Exchange[Any], answer: Any) -> Step:
    """What follows an answer, or a refusal, which an exchange may do without."""
    return exchange.throw(answer) if isinstance(answer, redis.RedisError) else exchange.send(answer)


def _unavailable(failed: str, error: redis.RedisError) -> ServerUnavailable:
    return ServerUnavailable(f"{failed}, the server does not answer or refuses us: {error}")
