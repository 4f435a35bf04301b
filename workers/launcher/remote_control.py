"""The launcher in Celery's remote control: asked and told from any shell or machine that reaches the server.

A node of Celery's own mailbox, as every worker is one, named `launcher.<models>@<host>`. So it needs no port, no key
and no password beyond the server's, a command reaches one launcher or all, and whoever sends it gets an answer.
Commands of others, such as Celery's `ping`, are none of its business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from celery import Celery

from embedq import tasks
from embedq.core.errors import InvalidInput, ServerUnavailable
from embedq.workers.launcher.server_thread import BROKEN, Connected

#: First part of a launcher's name, to tell it from a worker's.
PREFIX = "launcher."

#: Commands a launcher answers.
STATUS, SCALE = "embedq_status", "embedq_scale"

#: Seconds for which answers are collected; how many there will be is not known.
_ANSWERS_S = 1.5

#: Seconds one node has to answer.
_ANSWER_S = 5.0

#: Seconds between two looks whether to end.
_LOOK_S = 1.0


class Mailbox(Connected):
    """Answers commands until closed; each `handler` runs on this thread."""

    def __init__(self, name: str, handlers: Mapping[str, Callable[..., Any]], app: Celery = tasks.app) -> None:
        super().__init__("mailbox", app)
        self._node = app.control.mailbox.Node(
            name, handlers={command: _without_state(handler) for command, handler in handlers.items()}
        )

    def _begin(self, connection: Any) -> None:
        self._node.channel = connection.channel()
        self._node.listen(callback=self._receive)

    def _step(self, connection: Any) -> None:
        with suppress(TimeoutError):
            connection.drain_events(timeout=_LOOK_S)

    def _receive(self, body: dict[str, Any], message: Any) -> None:
        if body.get("method") in self._node.handlers:
            self._node.handle_message(body, message)


def ask_all() -> dict[str, dict[str, Any]]:
    """What every launcher, and every worker, answers to `embedq_status`, by their names."""
    return _ask(STATUS, timeout=_ANSWERS_S)


def scale(number: int | None, launcher: str | None = None) -> str:
    """Tell a launcher how many workers to have, None for as many as the backlog asks for. What it answers.

    InvalidInput if it must be named, is not there, or refuses.
    """
    if launcher is None:
        found = [name for name in ask_all() if name.startswith(PREFIX)]
        if len(found) != 1:
            raise InvalidInput(f"name one with --launcher: {len(found)} launchers answer {', '.join(sorted(found))}")
        launcher = found[0]
    answers = _ask(SCALE, [launcher], arguments={"number": number}, timeout=_ANSWER_S, limit=1)
    return _answer(launcher, answers)


def drain(worker: str) -> str:
    """Let one worker finish what it holds, and end. InvalidInput if none of this name answers."""
    return _answer(worker, _ask("shutdown", [worker], timeout=_ANSWER_S, limit=1))


def _answer(name: str, answers: dict[str, dict[str, Any]]) -> str:
    if name not in answers:
        raise InvalidInput(f"nobody named {name!r:.200} answers; `embedq status` lists who does")
    if "error" in answers[name]:
        raise InvalidInput(f"{name}: {answers[name]['error']}")
    return str(answers[name]["ok"])


def _ask(command: str, destination: list[str] | None = None, **sending: Any) -> dict[str, dict[str, Any]]:
    try:
        answers = tasks.app.control.broadcast(command, destination=destination, reply=True, **sending)
    except BROKEN as error:
        raise ServerUnavailable(
            f"no server answers to ask through; set EMBEDQ_REDIS_URL ({type(error).__name__})"
        ) from None
    return {name: answer for one in answers or [] for name, answer in one.items()}


def _without_state(handler: Callable[..., Any]) -> Callable[..., Any]:
    """kombu hands its node's state to every handler; ours have what they need."""
    return lambda _, **arguments: handler(**arguments)
