"""A launcher's node in Celery's remote control, on a real server."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from celery import Celery

from embedq.core.guarded_thread import num_ends
from embedq.workers.launcher.remote_control import Mailbox
from tests.own_server import OwnServer

NAME = "launcher.m@host"

TIMEOUT_S = 30.0


def refuse(number: int) -> dict[str, str]:
    raise ValueError(f"not {number}")


def application(own: OwnServer) -> Celery:
    return Celery("mailbox", broker=own.url, set_as_current=False)


@pytest.fixture
def node(own: OwnServer) -> Iterator[Mailbox]:
    """A node that echoes and refuses."""
    own.client.flushall()
    made = Mailbox(NAME, {"echo": lambda word: {"ok": word}, "refuse": refuse}, application(own))
    made.start()
    yield made
    made.close()
    made.join(TIMEOUT_S)
    assert not made.is_alive()


def ask(own: OwnServer, command: str, **sending: Any) -> list[dict[str, Any]]:
    with application(own) as app, contextlib.suppress(redis.ConnectionError):  # kombu's pool keeps what an outage broke
        return list(app.control.broadcast(command, reply=True, timeout=0.5, limit=1, **sending) or [])
    return []


def until(answer: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Ask until there is an answer: before the node listens there is none."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (found := answer()):
        assert time.monotonic() < deadline_s, "nobody answers"
    return found


@pytest.mark.usefixtures("node")
def test_whoever_asks_is_answered_also_after_the_server_was_away(own: OwnServer) -> None:
    assert until(lambda: ask(own, "echo", arguments={"word": "a"})) == [{NAME: {"ok": "a"}}]
    own.kill()
    own.start()
    assert until(lambda: ask(own, "echo", arguments={"word": "b"}, destination=[NAME])) == [{NAME: {"ok": "b"}}]


@pytest.mark.usefixtures("node")
def test_what_a_handler_raises_is_the_answer_and_it_goes_on(own: OwnServer) -> None:
    (refused,) = until(lambda: ask(own, "refuse", arguments={"number": 3}))
    assert "not 3" in refused[NAME]["error"]
    assert ask(own, "echo", arguments={"word": "c"}) == [{NAME: {"ok": "c"}}]


@pytest.mark.usefixtures("node")
def test_commands_for_others_are_not_answered(own: OwnServer) -> None:
    until(lambda: ask(own, "echo", arguments={"word": "a"}))
    assert ask(own, "ping") == []
    assert ask(own, "echo", arguments={"word": "a"}, destination=["launcher.other@host"]) == []


@pytest.mark.parametrize("rubbish", [b"{}", b"[]", b"no json", b'{"body": 5}', b"\xff"])
@pytest.mark.usefixtures("node")
def test_rubbish_on_the_control_channel_keeps_nobody_from_being_answered(own: OwnServer, rubbish: bytes) -> None:
    until(lambda: ask(own, "echo", arguments={"word": "a"}))
    before = num_ends["mailbox"]
    assert (
        own.client.publish("/0.celery.pidbox", rubbish) >= 1
    )  # kombu subscribes by pattern: no list of channels has it
    assert until(lambda: ask(own, "echo", arguments={"word": "b"})) == [{NAME: {"ok": "b"}}]
    assert num_ends["mailbox"] == before  # the thread went on, and was not merely started again
