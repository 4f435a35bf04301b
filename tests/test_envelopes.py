"""Messages as the transport reads and publishes them: as kombu's own does, whatever short way it takes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import kombu
import pytest
import redis

from embedq.workers.broker.transport import for_worker
from tests.consuming import OPTIONS, OURS, STOCK, Consuming, context, dead_letters

QUEUE = "envelopes"
TIMEOUT_S = 20


@pytest.fixture
def client(delivery_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(delivery_url) as client:
        client.flushall()
        yield client


def publish(url: str, transport: str, body: Any, **options: Any) -> None:
    used = for_worker(context())[0] if transport == OURS else transport
    with kombu.Connection(url, transport=used, transport_options=OPTIONS) as connection:
        kombu.Producer(connection.channel()).publish(body, serializer="json", **options)


def test_headers_of_any_type_arrive_as_they_were_sent(client: redis.Redis, delivery_url: str) -> None:
    headers = {
        "at": datetime(2026, 1, 2, tzinfo=UTC),
        "id": uuid.UUID(int=5),
        "price": Decimal("1.5"),
        "plain": {"a": [1]},
    }
    publish(delivery_url, STOCK, 1, routing_key=QUEUE, headers=headers)
    publish(delivery_url, STOCK, 2, routing_key=QUEUE, headers={"plain": "\u2028 ünï"})
    with Consuming(delivery_url, [QUEUE]) as worker:
        worker.run_until(lambda: len(worker.got) == 2)
        assert [message.headers for message in worker.got] == [headers, {"plain": "\u2028 ünï"}]


def test_a_header_of_a_type_nobody_knows_is_a_dead_letter(client: redis.Redis, delivery_url: str) -> None:
    publish(delivery_url, STOCK, 1, routing_key=QUEUE, headers={"odd": {"__type__": "odd", "__value__": 1}})
    publish(delivery_url, STOCK, 2, routing_key=QUEUE)
    with Consuming(delivery_url, [QUEUE]) as worker:
        worker.run_until(lambda: worker.got)
        assert worker.numbers() == [2]
    (letter,) = dead_letters(client)
    assert letter["reason"] == "cannot be delivered: ValueError"


@pytest.mark.parametrize("body", [{"text": 'quotes " and \\ and ünïcödé\n'}, "", "x" * 100_000])
def test_what_is_published_to_all_is_what_kombu_would_publish(
    client: redis.Redis, delivery_url: str, body: Any
) -> None:
    exchange = kombu.Exchange("everybody", type="fanout")
    with client.pubsub() as pubsub:
        pubsub.psubscribe("*everybody*")
        assert pubsub.get_message(timeout=TIMEOUT_S)
        for transport in (STOCK, OURS):
            publish(delivery_url, transport, body, exchange=exchange, routing_key="r", declare=[exchange])
        stock, ours = (pubsub.get_message(timeout=TIMEOUT_S) for _ in range(2))
    assert stock
    assert ours
    assert ours["channel"] == stock["channel"]
    told = [json.loads(message["data"]) for message in (stock, ours)]
    for envelope in told:
        del envelope["properties"]["delivery_tag"]  # made anew for each
    assert told[0] == told[1]
