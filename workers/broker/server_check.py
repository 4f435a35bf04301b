"""The server a worker depends on: whether it answers, whether it is one for us, and waiting until it does.

Knows no queue and no model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import kombu
import redis

from embedq.core.errors import InvalidSettings, ServerUnavailable
from embedq.tasks import config
from embedq.tasks.result_backend import is_refusal
from embedq.workers import logs
from embedq.workers.broker.transport import BROKEN

log = logging.getLogger(__name__)

#: How long a worker waits for its server before it gives up; longer than a server's restart.
_SERVER_TIMEOUT_S = 60.0


def with_server(url: str, do: Callable[[], None]) -> None:
    """Do what needs the server, again if it goes away meanwhile. ServerUnavailable after a minute of that.

    Loading takes long enough for a server to be restarted in between. An error would end this process as
    if its model could not be loaded, for which the launcher stops all of them.
    """
    deadline_s = time.monotonic() + _SERVER_TIMEOUT_S
    while True:
        _wait_for_server(url)
        try:
            return do()
        except BROKEN as error:
            if time.monotonic() > deadline_s:
                raise ServerUnavailable(
                    f"the server at {logs.without_password(url)} goes away again and again: {type(error).__name__}"
                ) from None
            log.warning("the server went away", extra={"action": "server_away", "error": type(error).__name__})
        time.sleep(1)


def _wait_for_server(url: str) -> None:
    """Return once the server answers. InvalidSettings at once if it refuses us: waiting does not cure that."""
    deadline_s, shown = time.monotonic() + _SERVER_TIMEOUT_S, logs.without_password(url)
    while True:
        try:
            return reach(url)
        except (redis.RedisError, OSError) as error:
            if is_refusal(error):
                raise InvalidSettings(
                    f"the server at {shown} and this worker do not trust each other: {error}"
                ) from None
            if time.monotonic() > deadline_s:
                raise ServerUnavailable(
                    f"no server answers at {shown} for {_SERVER_TIMEOUT_S:.0f} s ({error}); set EMBEDQ_REDIS_URL"
                ) from None
            log.warning("waiting for the server", extra={"action": "server_wait", "url": shown, "reason": str(error)})
        time.sleep(1)


def reach(url: str) -> None:
    """Ask the server at `url` for an answer; of Sentinels, the one they call master.

    redis.RedisError or OSError says why there is none. The way is the transport's, TLS included.
    """
    timeouts_s = {"socket_timeout": 1, "socket_connect_timeout": 1}
    transport = kombu.Connection(url, transport_options=config.broker_transport_options | timeouts_s).transport
    # Not by the connection, which tries a second time after two seconds: who asks here asks again soon.
    with closing(transport.create_channel(transport)) as channel:
        channel.client.ping()


def refuse_cluster(connection: Any) -> None:
    """InvalidSettings if the server of a kombu connection is part of a Redis Cluster."""
    with connection, redis.Redis(connection_pool=connection.channel().pool) as client:
        try:
            is_cluster = client.info("cluster").get("cluster_enabled")
        except redis.ResponseError:  # this user may not ask
            return
    if is_cluster:
        raise InvalidSettings(
            "the server is part of a Redis Cluster, which would spread the keys of one job over its nodes; "
            "use a server without cluster mode, with Sentinel where it must fail over"
        )
