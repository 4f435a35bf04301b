"""Many jobs in few writes, none lost and none sent by halves; large ones compressed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from kombu import compression
from kombu.exceptions import BatchPublishError, OperationalError
from kombu.utils import functional

from embedq import tasks
from embedq.core.errors import InvalidInput, JobTooLarge
from embedq.tasks import sending
from embedq.tasks.sending import OutgoingJob, _writes, compression_for


@pytest.fixture
def client(server: str) -> Iterator[redis.Redis]:
    """The server whose lists `unread` these tests fill, and nobody reads."""
    lists = [f"unread{suffix}" for suffix in ("", ":3", ":6", ":9")]
    with redis.Redis.from_url(server) as one:
        one.delete(*lists)
        yield one
        one.config_set("maxmemory", 0)
        one.delete(*lists)


def sent(client: redis.Redis, key: str = "unread") -> list[dict[str, Any]]:
    """The messages of a list, oldest first."""
    return [json.loads(message) for message in reversed(client.lrange(key, 0, -1))]


def texts_of(message: dict[str, Any]) -> Any:
    body = base64.b64decode(message["body"])
    if name := message["headers"].get("compression"):
        body = compression.decompress(body, name)
    return msgpack.unpackb(body)[0][0]


def test_many_jobs_arrive_in_order_each_under_its_id(client: redis.Redis) -> None:
    batches = [[f"text {index}"] for index in range(250)]
    jobs = tasks.embed_many(batches, {"queue": "unread"})
    messages = sent(client)
    assert [message["headers"]["id"] for message in messages] == [job.id for job in jobs]
    assert [texts_of(message) for message in messages] == batches
    assert {message["headers"]["argsrepr"] for message in messages[:10]} == {"1 text, 6 characters"}


def test_options_and_how_to_send_are_shared_by_all(client: redis.Redis) -> None:
    calls = (("a query", [f"passage {index}"]) for index in range(5))
    tasks.rerank_many(calls, {"queue": "unread", "priority": 9}, top_k=1)
    messages = sent(client, "unread:9")
    assert [message["headers"]["task"] for message in messages] == ["tasks.rerank"] * 5
    assert [message["headers"]["kwargsrepr"] for message in messages] == ["top_k=1"] * 5


def test_nothing_is_sent_if_one_is_wrong(client: redis.Redis) -> None:
    with pytest.raises(InvalidInput, match="given str"):
        tasks.embed_many([["fine"], "a bare string"], {"queue": "unread"})  # type: ignore[list-item]
    with pytest.raises(JobTooLarge):
        tasks.embed_many([["fine"], ["x"] * 10_001], {"queue": "unread"})
    assert sent(client) == []


def test_no_jobs_are_no_jobs(client: redis.Redis) -> None:
    assert tasks.embed_many([], {"queue": "unread"}) == []


def test_hundreds_of_jobs_go_in_few_writes(client: redis.Redis) -> None:
    tasks.embed_many([["warm"]], {"queue": "unread"})
    before = client.info("stats")["total_reads_processed"]
    tasks.embed_many([["x"]] * 500, {"queue": "unread"})
    # A read takes up to 16 KiB, which is some fifteen messages.
    assert client.info("stats")["total_reads_processed"] - before < 100


def test_a_write_that_fails_is_repeated_with_the_same_ids(client: redis.Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        client.config_set("maxmemory", 0)

    tasks.embed_many([["warm"]], {"queue": "unread"})
    monkeypatch.setattr(functional, "sleep", pause)
    client.config_set("maxmemory", 1)
    jobs = tasks.embed_many([[f"text {index}"] for index in range(20)], {"queue": "unread"})
    assert len(pauses) == 1
    assert [message["headers"]["id"] for message in sent(client)[1:]] == [job.id for job in jobs]


def test_jobs_whose_write_was_not_confirmed_are_sent_again_as_the_same_jobs(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = redis.client.Pipeline.execute
    has_failed: list[bool] = []

    def loses_its_first_answer(pipeline: Any, *args: Any) -> Any:
        answers = execute(pipeline, *args)
        if not has_failed:
            has_failed.append(True)
            raise redis.ConnectionError("the answer did not arrive")
        return answers

    monkeypatch.setattr(redis.client.Pipeline, "execute", loses_its_first_answer)
    jobs = tasks.embed_many([["one"], ["two"]], {"queue": "unread"})
    assert [message["headers"]["id"] for message in sent(client)] == [job.id for job in jobs] * 2


@pytest.mark.parametrize(
    ("max_retries", "waited_s", "expected"),
    [
        (0, 0, BatchPublishError),
        (3, 0 + 0.2 + 0.4, OperationalError),  # tried again, the write begins with the queue's own entry
        (8, 0 + 0.2 + 0.4 + 0.6 + 0.8 + 3, OperationalError),
    ],
)
def test_a_write_that_keeps_failing_is_tried_as_often_as_a_job_and_is_an_error(
    max_retries: int,
    waited_s: float,
    expected: type[Exception],
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(functional, "sleep", pauses.append)
    monkeypatch.setitem(tasks.app.conf.task_publish_retry_policy, "max_retries", max_retries)
    client.config_set("maxmemory", 1)
    with pytest.raises(expected):
        tasks.embed_many([["x"]], {"queue": "unread"})
    assert sum(pauses) == pytest.approx(waited_s)


def test_a_policy_without_an_end_goes_on_until_the_server_takes_it(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 30:
            client.config_set("maxmemory", 0)

    monkeypatch.setattr(functional, "sleep", pause)
    monkeypatch.setitem(tasks.app.conf.task_publish_retry_policy, "max_retries", None)
    client.config_set("maxmemory", 1)
    tasks.embed_many([["x"]], {"queue": "unread"})
    assert len(sent(client)) == 1


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3 * sending._MAX_BYTES_PER_WRITE), max_size=40))
def test_writes_keep_the_order_and_their_limits(sizes: list[int]) -> None:
    calls = [OutgoingJob((index,), {}, size, {}) for index, size in enumerate(sizes)]
    writes = list(_writes(calls))
    assert [call for write in writes for call in write] == calls
    assert all(write for write in writes)
    assert all(
        len(write) == 1 or sum(call.num_bytes for call in write) <= sending._MAX_BYTES_PER_WRITE for write in writes
    )


def test_a_write_has_a_limited_number_of_jobs() -> None:
    calls = [OutgoingJob((), {}, 1, {})] * 2500
    assert [len(write) for write in _writes(calls)] == [1000, 1000, 500]


def test_large_jobs_travel_compressed_and_small_ones_as_they_are(client: redis.Redis) -> None:
    texts = ["the same words again and again " * 100] * 40
    tasks.embed.apply_async((texts,), queue="unread")
    tasks.embed_many([texts], {"queue": "unread"})
    tasks.embed.apply_async((["x" * 1000],), queue="unread")
    large, many, small = sent(client)
    assert large["headers"]["compression"] == many["headers"]["compression"] == "application/zstd"
    assert len(large["body"]) < 10_000
    assert texts_of(large) == texts_of(many) == texts
    assert "compression" not in small["headers"]


def test_a_producer_that_cannot_compress_sends_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compression_for(sending.COMPRESS_FROM_BYTES) == "zstd"
    assert compression_for(sending.COMPRESS_FROM_BYTES - 1) is None
    monkeypatch.setattr(compression, "encoders", lambda: ["application/x-gzip"])
    assert compression_for(sending.COMPRESS_FROM_BYTES) is None
