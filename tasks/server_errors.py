"""One line for what the libraries below raise without a server, or from one that refuses us."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import redis
from kombu.exceptions import OperationalError

from embedq.core.errors import ServerUnavailable
from embedq.tasks.result_backend import is_refusal

#: What redis-py, kombu and Celery raise when the server is away or refuses us.
BROKEN = (redis.RedisError, OperationalError)


@contextmanager
def reaching_the_server() -> Iterator[None]:
    """ServerUnavailable, which says whether it does not answer or refuses us, for what the libraries raise."""
    try:
        yield
    except BROKEN as error:
        raise ServerUnavailable(reason(error)) from None


def reason(error: BaseException) -> str:
    """What is wrong with the server, for whoever set its URL."""
    below = error.__cause__ or error if isinstance(error, OperationalError) else error
    if is_refusal(below):
        return f"the server refuses us, or its certificate is not trusted; has the user of EMBEDQ_REDIS_URL the rights for this? {below}"
    return f"the server does not answer; is EMBEDQ_REDIS_URL right? {below}"
