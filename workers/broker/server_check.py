"""Checks the server before a worker starts: waits until it answers, and refuses a Redis Cluster.

Knows no queue and no model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import closing

import kombu
import redis

from embedq.core.errors import InvalidSettings, ServerUnavailable
from embedq.tasks import config
from embedq.tasks.result_backend import is_refusal
from embedq.workers import logs
from embedq.workers.broker.transport import BROKEN

log = logging.getLogger(__name__)

#: Seconds after which a worker without a server ends; longer than a server's restart.
_SERVER_TIMEOUT_S = 60.0


def with_server(url: str, do: Callable[[], None]) -> None:
    """Call `do` once the server answers, and again if its connection breaks. ServerUnavailable after a minute.

    Loading takes long enough for a server to be restarted in between. An error would end this process as if its model
    could not be loaded, and then the launcher stops all workers.
    """
    deadline_s = time.monotonic() + _SERVER_TIMEOUT_S
    while True:
        _wait_for_server(url)
        try:
            return do()
        except BROKEN as error:
            if time.monotonic() > deadline_s:
                raise ServerUnavailable(
                    f"the connection to the server at {logs.without_password(url)} breaks again and again: {type(error).__name__}"
                ) from None
            log.warning(
                "the connection to the server was lost", extra={"action": "server_away", "error": type(error).__name__}
            )
        time.sleep(1)


def _wait_for_server(url: str) -> None:
    """Return once the server answers. InvalidSettings at once if it refuses us, which waiting does not fix."""
    deadline_s, shown = time.monotonic() + _SERVER_TIMEOUT_S, logs.without_password(url)
    while True:
        try:
            return reach(url)
        except (redis.RedisError, OSError) as error:
            if is_refusal(error):
                raise InvalidSettings(
                    f"the server at {shown} refuses this worker, or its certificate is not trusted: {error}"
                ) from None
            if time.monotonic() > deadline_s:
                raise ServerUnavailable(
                    f"no server answers at {shown} for {_SERVER_TIMEOUT_S:.0f} s ({error}); set EMBEDQ_REDIS_URL"
                ) from None
            log.warning("waiting for the server", extra={"action": "server_wait", "url": shown, "reason": str(error)})
        time.sleep(1)


def reach(url: str) -> None:
    """Ping the server at `url`; of Sentinels, the master they name. redis.RedisError or OSError if it does not answer.

    It connects as the transport does, TLS included.
    """
    timeouts_s = {"socket_timeout": 1, "socket_connect_timeout": 1}
    transport = kombu.Connection(url, transport_options=config.broker_transport_options | timeouts_s).transport
    # Not by the connection, which tries a second time after two seconds: our callers try again sooner.
    with closing(transport.create_channel(transport)) as channel:
        channel.client.ping()


def refuse_cluster(connection: kombu.Connection) -> None:
    """InvalidSettings if the server of a kombu connection is part of a Redis Cluster."""
    with connection, redis.Redis(connection_pool=connection.channel().pool) as client:
        try:
            is_cluster = client.info("cluster").get("cluster_enabled")
        except redis.ResponseError:  # this user may not call INFO
            return
    if is_cluster:
        raise InvalidSettings(
            "the server is part of a Redis Cluster, which would spread the keys of one job over its nodes; "
            "use a server without cluster mode, with Sentinel where it must fail over"
        )
