"""How a producer's channel puts jobs: in the order in which they were sent, where kombu would, and through one client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from embedq import tasks
from embedq.core.batching.job import MAX_INTERACTIVE_PRIORITY
from embedq.tasks import job_channel


@pytest.fixture
def client(server: str) -> Iterator[redis.Redis]:
    """The server whose lists `embed.unread` these tests fill, and nobody reads."""
    lists = [f"embed.unread{suffix}" for suffix in ("", ":3", ":6", ":9")]
    with redis.Redis.from_url(server) as one:
        one.delete(*lists)
        yield one
        one.delete(*lists)


def test_interactive_priorities_are_those_of_the_engine() -> None:
    assert job_channel.MAX_INTERACTIVE_PRIORITY == MAX_INTERACTIVE_PRIORITY


def test_jobs_are_where_kombu_would_put_them_and_in_order(client: redis.Redis) -> None:
    sent = {
        priority: tasks.embed.apply_async((["a"],), queue="embed.unread", priority=priority).id
        for priority in range(10)
    }
    many = [job.id for job in tasks.embed_many([["a"], ["b"], ["c"]], {"queue": "embed.unread", "priority": 9})]
    for suffix, priorities in (("", (0, 1, 2)), (":3", (3, 4, 5)), (":6", (6, 7, 8)), (":9", (9,))):
        messages = list(reversed(client.lrange(f"embed.unread{suffix}", 0, -1)))
        expected = [sent[priority] for priority in priorities] + (many if suffix == ":9" else [])
        assert [one.encode() in message for one, message in zip(expected, messages, strict=True)] == [True] * len(
            expected
        )


def test_sending_makes_no_client_and_no_connection_for_each_job(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks.embed.apply_async((["a"],), queue="embed.unread")
    before = client.info("stats")["total_connections_received"]
    made: list[object] = []
    monkeypatch.setattr(redis, "Redis", made.append)
    for _ in range(5):
        tasks.embed.apply_async((["a"],), queue="embed.unread")
    assert made == []
    assert client.info("stats")["total_connections_received"] == before
