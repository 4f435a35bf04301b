"""Dead letters: a job that kills its workers ends, its neighbours do not; letters are kept, shown and sent again."""

from __future__ import annotations

import json
import time

import pytest
import redis
from celery import chord
from celery.exceptions import ChordError

from embedq import __version__, tasks
from embedq.core.errors import InvalidInput, Poisoned, ServerUnavailable
from embedq.tasks.__main__ import main
from embedq.tasks.dead import DeadLetters
from embedq.workers.broker.dead_letters import poisoned
from tests.consuming import Consuming, context, dead_letters, in_flight, send, waiting
from tests.echo_worker import app, die, echo
from tests.test_transport import TIMEOUT_S, answers, envelope, start, wait_until


def die_with(url: str, queue: str, count: int) -> None:
    """Take `count` jobs and go away as a killed worker does, with leases that end at once."""
    worker = Consuming(url, [queue], visibility_timeout=0.01)
    worker.run_until(lambda: len(worker.got) == count)
    worker.abandon()
    time.sleep(0.02)  # the lease ends by the server's clock, which tells nobody


def heir(url: str, queue: str) -> Consuming:
    """A worker that lives, and first gives back what dead ones held."""
    worker = Consuming(url, [queue])
    worker.channel.visibility_timeout = 0.01
    worker.channel.leases.give_back_expired()
    worker.channel.visibility_timeout = 30
    return worker


def test_a_job_that_kills_its_worker_is_dead_after_three_and_its_neighbours_live(url: str, client: redis.Redis) -> None:
    before = [echo.delay(number) for number in range(10)]
    deadly = die.delay()
    after = [echo.delay(number) for number in range(10)]
    num_deaths = 0
    running = start(url, ECHO_THREADS="1")  # what waits behind the deadly job dies with it
    try:
        while not client.xlen("embedq:dead"):
            if running.process.poll() is not None:
                num_deaths += 1
                assert num_deaths <= 3, "it was tried again"
                running = start(url, ECHO_THREADS="1")
            time.sleep(0.02)
        assert answers(before) == answers(after) == list(range(10))
        with pytest.raises(Poisoned, match=r"3 workers died while they held the job, at most 3 may: echo/\d+ \(taken"):
            deadly.get(timeout=TIMEOUT_S)
        assert num_deaths == 3
        wait_until(lambda: in_flight(client) == 0)  # stored first, acknowledged after
        assert client.hlen("embedq:jobs") == 0
    finally:
        running.stop()
    assert f"action=job_poisoned job={deadly.id}" in running.output
    (letter,) = dead_letters(client)
    assert letter["reason"] == "poisoned"
    assert letter["deliveries"].count("\n") == 3  # three deaths, and the worker that found it


def test_a_chord_with_a_poisoned_job_fails_instead_of_waiting_for_ever(url: str, client: redis.Redis) -> None:
    waiting_for = chord([echo.s(1), die.s()])(echo.si(2))
    for _ in range(3):
        with start(url, EMBEDQ_LEASE_S="1") as running:
            running.process.wait(TIMEOUT_S)
    # Not waiting_for itself, which would also find the failure in the job it waits for.
    with start(url, EMBEDQ_LEASE_S="1"), pytest.raises(ChordError, match="3 workers died"):
        app.AsyncResult(waiting_for.id).get(timeout=TIMEOUT_S)


def test_the_last_attempt_is_made_alone(url: str, client: redis.Redis) -> None:
    send(url, "a", *range(4))
    die_with(url, "a", 4)
    heir(url, "b").close()
    die_with(url, "a", 4)  # the second attempt: still together
    send(url, "a", 4)
    with heir(url, "a") as third:
        for number in range(4):
            third.run_until(lambda number=number: len(third.got) == number + 1)  # type: ignore[misc]
            third.turn()
            assert (third.numbers(), in_flight(client)) == (list(range(number + 1)), 1)
            third.got[-1].ack()
        third.run_until(lambda: len(third.got) == 5)  # never tried before: not alone because of itself
        third.got[-1].ack()


def test_a_job_on_its_last_attempt_is_not_waited_for_beyond_a_lease(url: str, client: redis.Redis) -> None:
    send(url, "a", 0)
    die_with(url, "a", 1)
    with Consuming(url, ["a", "b"], max_attempts=2, visibility_timeout=1) as worker:
        send(url, "b", 1)
        worker.run_until(lambda: len(worker.got) == 1)  # the neighbour; the other's lease ends later
        worker.run_until(lambda: len(worker.got) == 2, timeout_s=10)
        send(url, "b", 2)
        worker.run_until(lambda: len(worker.got) == 3, timeout_s=10)  # while both are still held
        assert in_flight(client) == 3


def test_a_job_given_back_a_hundred_times_is_not_poisoned(url: str, client: redis.Redis) -> None:
    send(url, "a", 0)
    with Consuming(url, ["a"]) as worker:
        worker.on_message = lambda message: (worker.got.append(message), message.reject(requeue=True))
        worker.run_until(lambda: len(worker.got) == 100)
    assert waiting(client, "a") == [0]
    assert not dead_letters(client)


def test_a_poisoned_message_that_cannot_be_read_is_buried_all_the_same(
    url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[str] = []
    of_test = context(fail=lambda message, error: failed.append(str(error)))
    send(url, "a", 0)
    client.lset("a", 0, client.lindex("a", 0).replace(b'"content-type"', b'"\xff"'))
    for _ in range(2):
        worker = Consuming(url, ["a"], worker=of_test, visibility_timeout=0.01, max_attempts=2)
        monkeypatch.setattr(worker.channel, "_deliver", lambda job: None)
        worker.run_until(lambda worker=worker: worker.channel.qos.taken)  # type: ignore[misc]
        worker.abandon()
        time.sleep(0.02)
        heir(url, "b").close()
    with Consuming(url, ["a"], worker=of_test, max_attempts=2) as last:
        last.run_until(lambda: client.xlen("embedq:dead"))
        assert not last.got
    assert (in_flight(client), client.llen("a"), failed) == (0, 0, [])


def test_a_poisoned_job_whose_failure_cannot_be_stored_is_not_buried_before_it_is(
    url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[str] = []

    def away(message: object, error: Poisoned) -> None:
        raise ServerUnavailable("the server of results is away")

    send(url, "a", 0)
    for _ in range(2):
        die_with(url, "a", 1)
        heir(url, "b").close()
    without_results = Consuming(url, ["a"], worker=context(fail=away), max_attempts=2)
    with pytest.raises(without_results.connection.connection_errors):  # Celery reconnects, and so tries again
        without_results.run_until(lambda: client.xlen("embedq:dead"))
    without_results.close()
    assert (client.xlen("embedq:dead"), waiting(client, "a"), in_flight(client)) == (0, [0], 0)
    told = context(fail=lambda message, error: failed.append(str(error)))
    with Consuming(url, ["a"], worker=told, max_attempts=2) as worker:
        worker.run_until(lambda: client.xlen("embedq:dead"))
    assert len(failed) == 1
    assert "2 workers died" in failed[0]  # waiting for the results' server was no death


def test_only_so_many_are_kept_and_all_are_counted(url: str, client: redis.Redis) -> None:
    letters = DeadLetters(client)
    assert letters.num_buried() == 0
    client.lpush("a", *(f"rubbish {number}" for number in range(30)))
    with Consuming(url, ["a"], max_dead_letters=10) as worker:
        worker.run_until(lambda: client.llen("a") == 0)
    assert [letter.message for letter in letters.all()] == [f"rubbish {number}".encode() for number in range(20, 30)]
    assert letters.num_buried() == 30


def test_attempts_of_jobs_that_are_gone_are_forgotten_after_a_day(url: str, client: redis.Redis) -> None:
    day_s = 86_400
    for tag, age_s in [("gone", day_s + 60), ("waits", day_s - 60), ("held", day_s + 60)]:
        client.hset("embedq:jobs", tag, f"{int((time.time() - age_s) * 1e6)}\t30\t1\tother\ta")
    client.hset("unacked", "held", '[1, "", "a"]')
    heir(url, "a").close()
    assert sorted(client.hkeys("embedq:jobs")) == [b"held", b"waits"]


def test_the_command_lists_shows_sends_again_and_drops(
    url: str, client: redis.Redis, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks.app.conf, "broker_url", url)
    client.lpush("a:3", envelope(headers={"id": "job-1", "task": "tasks.embed", "argsrepr": "1 text, 8 characters"}))
    client.lpush("a", "rubbish")
    with Consuming(url, ["a"]) as worker:
        worker.run_until(lambda: worker.got)
        worker.got[0].reject()
    assert main(["dead", "list"]) == 0
    rubbish, rejected = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert main(["dead", "show", rejected, rubbish]) == 0
    shown = capsys.readouterr().out
    assert all(
        part in shown for part in ("job-1", "tasks.embed", "1 text, 8 characters", "a:3", "rejected", context().process)
    )
    assert "not a JSON object" in shown
    assert shown.count(f"embedq {__version__}") == 2
    assert json.loads(envelope())["body"] not in shown
    assert main(["dead", "replay", rejected]) == 0
    assert (client.llen("a:3"), client.xlen("embedq:dead")) == (1, 1)
    assert main(["dead", "drop", "all"]) == 0
    assert client.xlen("embedq:dead") == 0
    assert main(["dead", "show", rejected]) == 1
    assert f"there is no dead letter '{rejected}'" in capsys.readouterr().err
    with Consuming(url, ["a"]) as worker:
        worker.run_until(lambda: worker.got)
        assert worker.got[0].headers["id"] == "job-1"
        worker.got[0].ack()


def test_what_was_too_large_to_be_kept_cannot_be_sent_again(url: str, client: redis.Redis) -> None:
    client.lpush("a", "x" * 2000)
    with Consuming(url, ["a"], max_message_bytes=1000) as worker:
        worker.run_until(lambda: client.xlen("embedq:dead"))
    letters = DeadLetters(client)
    (letter,) = letters.all()
    assert (letter.reason, letter.message, letter.headers) == ("larger than 1000 bytes", b"", {})
    with pytest.raises(InvalidInput, match="too large to be kept"):
        letters.replay(letter.id)
    with pytest.raises(InvalidInput, match="there is no dead letter 'x'"):
        letters.drop("x")


def test_the_error_says_how_often_when_and_where() -> None:
    deaths = [
        "1795264840084504\t60\t293\tminilm.cpu0@one/7\tembed",
        "1795264900084504\t60\t293\tminilm.cpu0@two/8\tembed",
    ]
    error = str(poisoned(deaths, 2))
    assert error.startswith(
        "2 workers died while they held the job, at most 2 may: minilm.cpu0@one/7 (taken 2026-11-21 "
    )
    assert "minilm.cpu0@two/8" in error
