"""Waits for results in asyncio; all waits of an event loop share one subscription.

    vectors = await tasks.aget(job, timeout=30)

A wait costs Redis one GET if the result is stored, else SUBSCRIBE and another GET, together with all waits that began
at the same moment. It uses no thread, and ends with its event loop; one that is closed without `asyncio.run` is left in silence.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Any, TypeAlias

import redis
import redis.asyncio as aio
from celery import states
from celery.backends.redis import RedisBackend
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult, EagerResult, ResultSet
from redis.asyncio.sentinel import Sentinel

from embedq.core.errors import InvalidInput, ServerUnavailable
from embedq.tasks.application import app as ours
from embedq.tasks.celery_private import known_meta, set_meta, transport_options
from embedq.tasks.job_results import refuse_on_our_queue
from embedq.tasks.result_backend import MAX_KEYS_PER_MGET, is_refusal

log = logging.getLogger(__name__)

#: Seconds without a message after which the server is pinged, and seconds it has to answer. A connection that died
#: silently is detected after both.
_QUIET_S, _ANSWER_S = 25.0, 15.0

#: Seconds between two attempts to reach the server, and seconds after which waits fail.
_PAUSE_S, _MAX_OUTAGE_S = 0.2, 60.0

#: Class of a blocking connection -> class of the asyncio connection.
_CONNECTIONS = {
    redis.SSLConnection: aio.SSLConnection,
    redis.UnixDomainSocketConnection: aio.UnixDomainSocketConnection,
}


#: A job, a group, or a list or tuple of them.
WaitedFor: TypeAlias = AsyncResult | ResultSet | list[Any] | tuple[Any, ...]


async def wait_for(job: WaitedFor, timeout: float | None = None) -> Any:
    """Return or raise what `job.get(timeout)` would; for a group, a list or a tuple, return the list of its jobs' results.

    celery.exceptions.TimeoutError after `timeout` seconds; ServerUnavailable if the server cannot
    be reached for a minute, and at once if it refuses us.
    """
    refuse_on_our_queue(ours)
    try:
        async with asyncio.timeout(timeout) as limit:
            return await _value(job)
    except TimeoutError:
        if limit.expired():
            raise CeleryTimeoutError("The operation timed out.") from None
        raise


async def _value(job: Any) -> Any:
    if isinstance(job, EagerResult):  # computed already, in this process
        return job.get(disable_sync_subtasks=False)
    if isinstance(job, ResultSet | list | tuple) and not isinstance(job, AsyncResult):
        each = job.results if isinstance(job, ResultSet) else job
        parts = [asyncio.ensure_future(_value(one)) for one in each]
        try:
            return await asyncio.gather(*parts)
        finally:
            for part in parts:  # the first error ends the wait for the others
                part.cancel()
    if not isinstance(job, AsyncResult):
        raise InvalidInput(f"aget waits for jobs, groups, and lists of them; given {type(job).__name__}")
    if job.ignored:
        return None
    if known_meta(job) is None:
        set_meta(job, await _waits(job.backend).meta(job.backend.get_key_for_task(job.id)))
    return job.maybe_throw()


_all_waits: dict[tuple[asyncio.AbstractEventLoop, str], Waits] = {}


def _waits(backend: RedisBackend) -> Waits:
    """The waits of the running event loop on the server of `backend`."""
    place = (asyncio.get_running_loop(), backend.as_uri(include_password=True))
    if place not in _all_waits:
        for loop, url in [known for known in _all_waits if known[0].is_closed()]:
            del _all_waits[loop, url]
        _all_waits[place] = Waits(backend)
    return _all_waits[place]


class Waits:
    """All results that one event loop waits for on one server."""

    def __init__(self, backend: RedisBackend) -> None:
        self._backend = backend
        self._loop = asyncio.get_running_loop()
        self._futures: dict[bytes, set[asyncio.Future[dict[str, Any]]]] = {}
        #: Keys whose subscription the server confirmed, not yet read since.
        self._confirmed: set[bytes] = set()
        self._changed = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None
        #: Since the last outage.
        self._is_connected = False

    async def meta(self, key: bytes) -> dict[str, Any]:
        """Wait for Celery's result map at `key`, and return it once it is ready."""
        future = asyncio.get_running_loop().create_future()
        self._futures.setdefault(key, set()).add(future)
        self._changed.set()
        if self._serving is None or self._serving.done():
            self._serving = _quiet_task(self._serve())
        try:
            return dict(await future)
        finally:
            self._futures[key].discard(future)
            if not self._futures[key]:
                del self._futures[key]
                self._changed.set()

    async def _serve(self) -> None:
        """Connect, and reconnect when the connection is lost, until the loop ends or the server stays away."""
        (client, *its_sentinels), lost_s = make_clients(self._backend), time.monotonic()
        try:
            while time.monotonic() - lost_s < _MAX_OUTAGE_S and not _is_cancelled():
                try:
                    await self._subscribed(client)
                except (redis.RedisError, OSError) as error:
                    if is_refusal(error):
                        raise ServerUnavailable(
                            f"the server of results refuses us, or its certificate is not trusted: {error}"
                        ) from None
                    log.warning(
                        "waits for results pause: the server cannot be reached",
                        extra={"action": "waits_interrupted", "error": repr(error)},
                    )
                if self._is_connected:
                    self._is_connected, lost_s = False, time.monotonic()
                await asyncio.sleep(_PAUSE_S)
            if not _is_cancelled():
                self._fail(ServerUnavailable(f"the server of results could not be reached for {_MAX_OUTAGE_S:.0f} s"))
        except Exception as error:  # raised in every wait: otherwise they would wait for ever
            self._fail(error)
        finally:
            # A loop that was closed while this task waited runs nothing any more: Python ends the task when it is collected.
            if not self._loop.is_closed():
                self._fail(asyncio.CancelledError())
                for one in (client, *its_sentinels):
                    await one.aclose()

    async def _subscribed(self, client: aio.Redis) -> None:
        pubsub = client.pubsub()
        try:
            await self._serve_connected(client, pubsub)
        finally:
            if not self._loop.is_closed():
                await pubsub.aclose()

    async def _serve_connected(self, client: aio.Redis, pubsub: Any) -> None:
        await pubsub.connect()
        self._is_connected = True
        self._changed.set()
        parts = [_quiet_task(self._listen(pubsub)), _quiet_task(self._follow(client, pubsub))]
        try:
            ended, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for part in ended:
                part.result()
        finally:
            if not self._loop.is_closed():
                for part in parts:
                    part.cancel()
                await asyncio.wait(parts)

    async def _listen(self, pubsub: Any) -> None:
        """Read messages from the server; ping it when it is quiet."""
        is_asked = False
        while not _is_cancelled():
            message = await pubsub.get_message(timeout=_ANSWER_S if is_asked else _QUIET_S)
            if message is None:
                if is_asked:
                    raise redis.ConnectionError("the server does not answer")
                await pubsub.ping()
            is_asked = message is None
            if message and message["type"] == "subscribe":
                self._confirmed.add(message["channel"])
                self._changed.set()
            elif message and message["type"] == "message":
                self._answer(message["channel"], message["data"])

    async def _follow(self, client: aio.Redis, pubsub: Any) -> None:
        """Subscribe and unsubscribe as waits begin and end, all changes of a moment in one command.

        A key is read before it is subscribed to, which mostly makes the subscription needless, and again when the
        server has confirmed it: a result stored in between is then seen in one of the two places.
        """
        subscribed: set[bytes] = set()
        while not _is_cancelled():
            await self._changed.wait()
            self._changed.clear()
            confirmed, self._confirmed = self._confirmed, set()
            await self._read(client, confirmed | (self._unanswered() - subscribed))
            if new := self._unanswered() - subscribed:
                await pubsub.subscribe(*new)
            # A program that ran the loop for one wait alone has stopped it by then, and no command is cut off in the middle.
            await asyncio.sleep(0)
            if old := subscribed - self._futures.keys():
                await pubsub.unsubscribe(*old)
            subscribed = (subscribed | new) - old

    async def _read(self, client: aio.Redis, keys: set[bytes]) -> None:
        wanted = [key for key in keys if key in self._futures]
        for begin in range(0, len(wanted), MAX_KEYS_PER_MGET):
            some = wanted[begin : begin + MAX_KEYS_PER_MGET]
            for key, blob in zip(some, await client.mget(some), strict=True):
                if blob:
                    self._answer(key, blob)

    def _unanswered(self) -> set[bytes]:
        return {key for key, futures in self._futures.items() if not all(future.done() for future in futures)}

    def _answer(self, key: bytes, blob: bytes) -> None:
        """Finish all waits for a result. If its blob cannot be read, they raise, and no others do."""
        waiting = [future for future in self._futures.get(key, ()) if not future.done()]
        if not waiting:
            return
        try:
            meta = self._backend.decode_result(blob)
        except Exception as error:
            for future in waiting:
                future.set_exception(error)
            return
        if meta["status"] in states.READY_STATES:
            for future in waiting:
                future.set_result(meta)

    def _fail(self, error: BaseException) -> None:
        for future in [future for futures in self._futures.values() for future in futures if not future.done()]:
            if isinstance(error, asyncio.CancelledError):
                future.cancel()
            else:
                future.set_exception(error)


def _quiet_task(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """A task that may be pending when its loop is closed: it serves until then, and asyncio must not log that as an error."""
    task = asyncio.create_task(work)
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # as asyncio does for its own
    return task


def _is_cancelled() -> bool:
    """Returns True if this task was cancelled and the cancellation got lost.

    `asyncio.wait_for`, which the client library sends with, loses a cancellation that comes as the
    sending ends (until Python 3.12); the loop could then never close.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def make_clients(backend: RedisBackend) -> list[aio.Redis]:
    """Make an asyncio client for the server of `backend`, with the same credentials and TLS.

    After it in the list come the clients of the Sentinels that it asks for the server's address.
    """
    params = {name: value for name, value in backend.connparams.items() if value is not None}
    connection_class = params.pop("connection_class", None)
    if "hosts" in params:
        options = transport_options(backend)
        sentinel = Sentinel(
            [(one["host"], one["port"]) for one in params.pop("hosts")],
            min_other_sentinels=options.get("min_other_sentinels", 0),
            sentinel_kwargs=options.get("sentinel_kwargs", {}),
            **params,
        )
        return [sentinel.master_for(options.get("master_name")), *sentinel.sentinels]
    pool = aio.ConnectionPool(connection_class=_CONNECTIONS.get(connection_class, aio.Connection), **params)
    return [aio.Redis.from_pool(pool)]
