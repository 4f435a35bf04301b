"""Jobs in flight: renewed while their worker lives, given back in order when it does not."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from celery import Celery

from embedq.workers.broker.leases import LeaseRenewal, give_back_jobs_of, renew
from tests.consuming import STOCK, Consuming, calls, context, dead_letters, in_flight, send, waiting

#: Seconds; short enough to wait for, long enough for a busy machine to renew in time.
LEASE_S = 1.5


def took(url: str, queue: str, count: int, **options: Any) -> Consuming:
    """A worker that has just taken `count` jobs."""
    worker = Consuming(url, [queue], **options)
    worker.run_until(lambda: len(worker.got) == count)
    return worker


def test_what_a_closing_worker_holds_goes_back_to_the_head_in_its_order(url: str, client: redis.Redis) -> None:
    send(url, "a", *range(5))
    worker = took(url, "a", 5)
    send(url, "a", 5, 6)
    worker.got[1].ack()
    worker.close()
    assert waiting(client, "a") == [0, 2, 3, 4, 5, 6]
    assert in_flight(client) == 0  # and no attempt is counted


def test_a_job_given_back_goes_to_the_head_and_counts_no_attempt(url: str, client: redis.Redis) -> None:
    send(url, "a", 0, 1)
    with Consuming(url, ["a"]) as worker:
        worker.consumer.qos(prefetch_count=1)
        worker.run_until(lambda: worker.got)
        worker.got[0].reject(requeue=True)
        worker.run_until(lambda: len(worker.got) == 2)
        assert worker.numbers() == [0, 0]
        assert not worker.got[1].headers.get("redelivered")
    assert waiting(client, "a") == [0, 1]


def test_a_rejected_job_becomes_a_dead_letter(url: str, client: redis.Redis) -> None:
    send(url, "a", 0)
    with Consuming(url, ["a"]) as worker:
        worker.run_until(lambda: worker.got)
        worker.got[0].reject()
    assert in_flight(client) == client.llen("a") == 0
    (letter,) = dead_letters(client)
    assert (letter["reason"], letter["list"]) == ("rejected", "a")
    assert '"delivery_tag"' in letter["message"]


@pytest.mark.timing
def test_a_dead_workers_jobs_are_elsewhere_within_a_lease_and_a_half(url: str, client: redis.Redis) -> None:
    send(url, "a", *range(4))
    worker = took(url, "a", 4, visibility_timeout=LEASE_S)
    # A dead stock worker's lock, which stops every sweep of kombu's for minutes.
    client.set("unacked_mutex", "dead", ex=300)
    renew(worker.channel)
    died_s = time.monotonic()
    worker.abandon()
    with Consuming(url, ["a"], visibility_timeout=LEASE_S, unacked_restore_interval=LEASE_S / 4) as heir:
        heir.run_until(lambda: len(heir.got) == 4)
        assert LEASE_S * 0.9 < time.monotonic() - died_s < LEASE_S * 1.5 + 0.2
        assert heir.numbers() == [0, 1, 2, 3]
        assert all(message.headers["redelivered"] for message in heir.got)
        assert all(lines.count(b"\n") == 1 for lines in client.hvals("embedq:jobs"))  # the second attempt of each
        for message in heir.got:
            message.ack()
        heir.run_until(lambda: in_flight(client) == 0)


def test_the_jobs_of_a_process_that_has_ended_return_at_once_and_no_others(url: str, client: redis.Redis) -> None:
    send(url, "a", *range(1_200))
    dead = took(url, "a", 1_200, worker=context(process="dead@here/1"))
    send(url, "a", *range(1_200, 1_500))
    with Consuming(url, ["a"], worker=context(process="dead@here/11")) as alive:
        alive.run_until(lambda: len(alive.got) == 300)
        dead.abandon()
        give_back_jobs_of("dead@here/1", Celery(broker=url))
        assert (len(waiting(client, "a")), in_flight(client)) == (1_200, 300)
        for message in alive.got:
            message.ack()
        alive.run_until(lambda: len(alive.got) == 1_500)
        assert set(alive.numbers()) == set(range(1_500))
        assert all(message.headers["redelivered"] for message in alive.got[300:])
        assert {lines.count(b"\n") for lines in client.hvals("embedq:jobs")} == {1}  # the second attempt of each


def test_looking_for_expired_leases_costs_one_call_however_many_there_are(url: str, client: redis.Redis) -> None:
    send(url, "a", *range(300))
    took(url, "a", 300, visibility_timeout=0.1).abandon()
    time.sleep(0.2)  # the leases end by the server's clock, which tells nobody
    with Consuming(url, ["b"], visibility_timeout=0.1, unacked_restore_interval=60) as heir:
        client.config_resetstat()
        heir.channel.qos.restore_visible()
        assert waiting(client, "a") == list(range(300))
        heir.channel.qos.restore_visible()  # too soon to ask again
        assert calls(client, "evalsha", "eval") <= 1


def test_a_busy_event_loop_loses_no_lease_and_a_hung_engine_does(url: str, client: redis.Redis) -> None:
    send(url, "a", 0)
    is_alive = [True]
    worker = took(url, "a", 1, worker=context(is_alive=lambda: is_alive[0]), visibility_timeout=LEASE_S)
    consumer = SimpleNamespace(task_consumer=SimpleNamespace(channel=worker.channel))
    step = LeaseRenewal(consumer)
    step.start(consumer)
    try:
        with Consuming(url, ["a"], worker=context(process="another"), visibility_timeout=LEASE_S) as heir:
            heir.run_for(2 * LEASE_S)  # all that while the first worker's loop does not turn
            assert not heir.got
            step.stop(consumer)  # told to stop, it still computes what it took
            heir.run_for(1.5 * LEASE_S)
            assert not heir.got
            is_alive[0] = False
            heir.run_until(lambda: heir.got, timeout_s=2 * LEASE_S)
            is_alive[0] = True
            # It wakes up again: what is another's by now is neither renewed nor taken from it.
            assert renew(worker.channel) == 0
            worker.close()
            assert (client.llen("a"), in_flight(client)) == (0, 1)
    finally:
        step.shutdown(consumer)
    assert step._thread is not None
    assert not step._thread.is_alive()


def test_a_worker_whose_renewal_is_late_keeps_its_own_jobs(url: str, client: redis.Redis) -> None:
    send(url, "a", 0)
    with Consuming(url, ["a"], visibility_timeout=0.2) as worker:
        worker.run_until(lambda: worker.got)
        time.sleep(0.4)  # and so does this one
        worker.run_for(1)
        assert worker.numbers() == [0]
        assert in_flight(client) == 1


def test_an_acknowledged_job_is_not_renewed_into_life_again(url: str, client: redis.Redis) -> None:
    send(url, "a", 0)
    with Consuming(url, ["a"]) as worker:
        worker.run_until(lambda: worker.got)
        worker.got[0].ack()
        held_until_sent = renew(worker.channel)
        worker.channel.qos.flush()
        assert (held_until_sent, renew(worker.channel)) == (1, 0)
        assert in_flight(client) == 0


def test_renewal_outlives_a_channel_that_is_closed_meanwhile(url: str, client: redis.Redis) -> None:
    closed = Consuming(url, ["a"], visibility_timeout=0.1)
    consumer = SimpleNamespace(task_consumer=SimpleNamespace(channel=closed.channel))
    step = LeaseRenewal(consumer)
    step.start(consumer)
    try:
        qos = closed.channel.qos
        closed.connection.close()
        qos.taken.add("a tag", qos)  # is still computed, and the next connection is not there yet
        assert step._thread
        step._thread.join(0.3)  # some renewals
        assert step._thread.is_alive()
    finally:
        step.shutdown(consumer)
        qos.taken.clear()
        closed.hub.close()


@pytest.mark.parametrize("is_taken_again", [False, True])
def test_a_worker_that_comes_back_late_acknowledges_nothing_of_others(
    url: str, client: redis.Redis, is_taken_again: bool
) -> None:
    send(url, "a", 0)
    hung = took(url, "a", 1, visibility_timeout=0.01)
    heir = Consuming(url, ["a"], worker=context(process="another"), visibility_timeout=0.01)
    time.sleep(0.02)  # the lease runs out
    heir.channel.leases.give_back_expired()
    heir.channel.visibility_timeout = LEASE_S
    if is_taken_again:
        heir.run_until(lambda: heir.got)
    hung.channel.leases.acknowledge([hung.got[0].delivery_tag])
    assert (waiting(client, "a"), in_flight(client)) == (([], 1) if is_taken_again else ([0], 0))
    heir.run_until(lambda: heir.got)
    assert heir.got[0].headers["redelivered"]  # so that a result that is stored already is found
    heir.got[0].ack()
    heir.close()
    assert (waiting(client, "a"), in_flight(client), client.hlen("embedq:jobs")) == ([], 0, 0)
    hung.abandon()


def test_acknowledgements_that_could_not_be_sent_are_sent_by_the_next_connection(url: str, client: redis.Redis) -> None:
    send(url, "a", 0, 1)
    worker = took(url, "a", 2)
    worker.got[0].ack()
    client.execute_command("ACL", "SETUSER", "default", "-zrem")
    try:
        with pytest.raises(redis.ResponseError):
            worker.turn()
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+zrem")
    worker.close()
    assert (waiting(client, "a"), in_flight(client)) == ([1], 0)


def test_what_could_not_be_given_back_is_by_the_next_connection(url: str, client: redis.Redis) -> None:
    send(url, "a", *range(4))
    running: set[str] = set()
    of_process = context(running=lambda: running)
    worker = took(url, "a", 4, worker=of_process)
    ids = {"0": worker.got[0], "3": worker.got[3]}
    for job_id, message in ids.items():
        message.headers["id"] = job_id
    running |= ids.keys()
    client.execute_command("ACL", "SETUSER", "default", "-evalsha")
    worker.close()
    client.execute_command("ACL", "SETUSER", "default", "+evalsha")
    assert in_flight(client) == 4
    with Consuming(url, ["b"], worker=of_process) as successor:
        successor.run_until(lambda: client.llen("a"))
        assert waiting(client, "a") == [1, 2]  # the others are being computed
        ids["0"].reject(requeue=True)
        ids["3"].ack()
        successor.run_until(lambda: not in_flight(client))
        assert waiting(client, "a") == [0, 1, 2]


def test_jobs_of_stock_workers_are_given_back_only_after_kombus_own_timeout(url: str, client: redis.Redis) -> None:
    send(url, "a", 0)
    stock = took(url, "a", 1, transport=STOCK)
    with Consuming(url, ["b"], visibility_timeout=0.1) as worker:
        worker.run_for(0.5)
        assert client.llen("a") == 0
        (tag,) = client.hkeys("unacked")
        client.zadd("unacked_index", {tag: time.time() - 3601})
        worker.run_until(lambda: client.llen("a") == 1)
    stock.abandon()


def test_any_number_of_jobs_of_stock_workers_are_found_in_one_call(url: str, client: redis.Redis) -> None:
    num_jobs, long_ago_s = 20_000, time.time() - 7200
    with Consuming(url, ["b"]) as worker:
        for begin in range(0, num_jobs, 1000):
            tags = [f"foreign-{number}" for number in range(begin, begin + 1000)]
            client.hset("unacked", mapping=dict.fromkeys(tags, '["{}", "", "a"]'))
            client.zadd("unacked_index", dict.fromkeys(tags, long_ago_s))
        num_own, foreign = worker.channel.leases.give_back_expired()
        client.flushall()
    assert (num_own, len(foreign)) == (0, num_jobs)


def test_a_lease_is_a_workers_own_affair_by_the_servers_clock(url: str, client: redis.Redis) -> None:
    send(url, "a", 0)
    worker = took(url, "a", 1, visibility_timeout=30)
    with Consuming(url, ["b"], visibility_timeout=0.1) as impatient:
        impatient.run_for(0.5)
        assert client.llen("a") == 0
    worker.close()
    assert waiting(client, "a") == [0]
