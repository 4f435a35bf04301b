"""Messages that are bombs, or nothing at all: refused with a reason, and the worker goes on."""

from __future__ import annotations

import base64
import bz2
import json
import tracemalloc
import zlib
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import msgpack
import pytest
import redis
from backports import zstd
from kombu import compression

from embedq import tasks
from embedq.core.errors import InvalidInput, JobTooLarge, ServerUnavailable
from embedq.workers.broker import decompression
from embedq.workers.broker.decompression import inflate_gzip, inflate_zstd, restrict
from embedq.workers.jobs.rejected_messages import refuse
from tests.consuming import Consuming, dead_letters, in_flight, send, waiting
from tests.test_transport import wait_until

#: What the tests let a message hold.
MAX_BYTES = 1_000_000

TEXTS = msgpack.packb([[["some text"] * 1000], {}, {}])


def zstd_without_size(data: bytes) -> bytes:
    """A frame that does not tell how much it holds."""
    stream = zstd.ZstdCompressor()
    return b"".join([stream.compress(data[:100]), stream.compress(data[100:]), stream.flush()])


@pytest.mark.parametrize("compress", [zstd.compress, zstd_without_size, zlib.compress])
def test_an_honest_message_comes_out_as_it_went_in(compress: Any) -> None:
    inflate = inflate_gzip if compress is zlib.compress else lambda data, limit: inflate_zstd(zstd, data, limit)
    assert inflate(compress(TEXTS), len(TEXTS)) == TEXTS
    with pytest.raises(JobTooLarge, match=r"may hold .* bytes; this one holds more. Send several jobs"):
        inflate(compress(TEXTS), len(TEXTS) - 1)


@pytest.mark.parametrize(
    ("compress", "most_bytes"),
    [(zstd.compress, 50_000), (zstd_without_size, 4 * MAX_BYTES), (zlib.compress, 4 * MAX_BYTES)],
)
def test_a_bomb_takes_no_more_memory_than_the_limit(compress: Any, most_bytes: int) -> None:
    inflate = inflate_gzip if compress is zlib.compress else lambda data, limit: inflate_zstd(zstd, data, limit)
    bomb = compress(bytes(200_000_000))
    tracemalloc.start()
    with pytest.raises(JobTooLarge):
        inflate(bomb, MAX_BYTES)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < most_bytes  # next to nothing where the frame tells its size


@pytest.mark.parametrize("compress", [zstd.compress, zlib.compress])
@pytest.mark.parametrize("spoil", [lambda data: data[:-5], lambda data: data + b"more", lambda data: b"nothing" + data])
def test_what_is_no_whole_message_is_refused(compress: Any, spoil: Any) -> None:
    inflate = inflate_gzip if compress is zlib.compress else lambda data, limit: inflate_zstd(zstd, data, limit)
    with pytest.raises(InvalidInput):
        inflate(spoil(compress(TEXTS)), MAX_BYTES)


def test_a_frame_that_asks_for_a_large_window_is_refused() -> None:
    frame = zstd.compress(bytes(100), options={zstd.CompressionParameter.window_log: 27})
    streamed = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    wide = streamed.compress(bytes(100)) + streamed.flush()
    assert inflate_zstd(zstd, frame, MAX_BYTES) == bytes(100)  # a small frame needs no window
    with pytest.raises(InvalidInput, match="32 MiB"):
        inflate_zstd(zstd, wide, MAX_BYTES)


def test_other_codecs_are_refused_and_producers_can_still_use_them() -> None:
    kept = {name: compression.get_decoder(name) for name in compression.encoders()}
    try:
        restrict(MAX_BYTES)
        assert compression.decompress(*compression.compress(TEXTS, "zstd")) == TEXTS
        assert compression.decompress(*compression.compress(TEXTS, "gzip")) == TEXTS
        for name in ("bzip2", "lzma"):
            with pytest.raises(InvalidInput, match="with zstd or gzip, not application/x-"):
                compression.decompress(*compression.compress(TEXTS, name))
    finally:
        for name, decode in kept.items():
            compression.register(compression.get_encoder(name)[0], decode, name)


def test_a_worker_without_zstd_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {name: compression.get_decoder(name) for name in compression.encoders()}
    monkeypatch.setattr(decompression, "_zstd", lambda: None)
    try:
        restrict(MAX_BYTES)
        with pytest.raises(InvalidInput, match="not application/zstd"):
            compression.decompress(zstd.compress(TEXTS), "application/zstd")
    finally:
        for name, decode in kept.items():
            compression.register(compression.get_encoder(name)[0], decode, name)


def put(client: redis.Redis, body: bytes, **headers: Any) -> Any:
    """Leave a message for the worker as any producer can; its result."""
    job_id = str(uuid4())
    message = {
        "body": base64.b64encode(body).decode(),
        "content-encoding": "binary",
        "content-type": "application/x-embedq-msgpack",
        "headers": {"task": "tasks.embed", "id": job_id, "lang": "py", "root_id": job_id, "parent_id": None} | headers,
        "properties": {
            "delivery_tag": job_id,
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "embed"},
        },
    }
    client.lpush("embed", json.dumps(message))
    return tasks.app.AsyncResult(job_id)


@pytest.mark.usefixtures("worker")
def test_the_worker_answers_what_it_refuses_and_goes_on(server: str) -> None:
    with redis.Redis.from_url(server) as client:
        bombs = [
            put(client, zstd.compress(bytes(300_000_000)), compression="application/zstd"),
            put(client, zstd_without_size(bytes(300_000_000)), compression="zstd"),
            put(client, zlib.compress(bytes(300_000_000)), compression="application/x-gzip"),
        ]
        odd = [
            put(client, bz2.compress(TEXTS), compression="application/x-bz2"),
            put(client, TEXTS, compression="application/x-unheard-of"),
            put(client, TEXTS, compression="application/zstd"),
        ]
        good = tasks.embed.delay(["a text that is long enough to be compressed " * 20] * 100)
        assert good.get(timeout=60).dense.shape == (100, 384)
        for job in bombs:
            with pytest.raises(JobTooLarge, match="33,554,432 bytes"):
                job.get(timeout=30)
        for job in odd:
            with pytest.raises(InvalidInput):
                job.get(timeout=30)
        # Acknowledged after the result is stored; other tests' jobs may be in flight.
        wait_until(lambda: not any(client.hexists("unacked", job.id) for job in bombs + odd))


@pytest.mark.usefixtures("worker")
def test_what_names_no_job_becomes_a_dead_letter(server: str) -> None:
    with redis.Redis.from_url(server) as client:
        tags = [put(client, TEXTS, id=job_id).id for job_id in ({"x": None}, 7)]
        wait_until(lambda: not client.llen("embed") and not any(client.hexists("unacked", tag) for tag in tags))
        reasons = {letter["tag"]: letter["reason"] for letter in dead_letters(client)}
        assert [reasons.get(tag) for tag in tags] == ["rejected"] * 2


def test_a_refusal_that_cannot_be_stored_gives_the_message_back_instead_of_holding_it(
    url: str, client: redis.Redis
) -> None:
    def away(job_id: str, reason: Exception, request: Any) -> None:
        raise ServerUnavailable("the server of results is away")

    send(url, "a", 1)
    with Consuming(url, ["a"]) as worker:
        worker.run_until(lambda: worker.got)
        (message,) = worker.got
        message.headers["id"] = "a job"
        consumer: Any = SimpleNamespace(
            app=SimpleNamespace(backend=SimpleNamespace(mark_as_failure=away)),
            connection_errors=worker.connection.connection_errors,
        )
        refuse(consumer, message, ValueError("senseless"))
        assert (waiting(client, "a"), in_flight(client), dead_letters(client)) == ([1], 0, [])
