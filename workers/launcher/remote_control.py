"""Controls launchers from any machine that reaches the server, through Celery's remote control.

A launcher is a node of Celery's mailbox, like a worker, named `launcher.<models>@<host>`. So it needs no port, no key
and no password beyond the server's; a command reaches one launcher or all, and its sender gets an answer. It ignores
other commands, such as Celery's `ping`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from celery import Celery

from embedq import tasks
from embedq.core.errors import InvalidInput, ServerUnavailable
from embedq.tasks.server_errors import reason
from embedq.workers.launcher.server_thread import BROKEN, Connected

log = logging.getLogger(__name__)

#: First part of a launcher's name, to distinguish it from a worker's.
PREFIX = "launcher."

#: Commands a launcher answers.
STATUS, SCALE = "embedq_status", "embedq_scale"

#: Seconds for which answers are collected, since their number is unknown.
_ANSWERS_S = 1.5

#: Seconds one node has to answer.
_ANSWER_S = 5.0

#: Seconds after which a closed mailbox ends.
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
        try:
            connection.drain_events(timeout=_LOOK_S)
        except TimeoutError:
            pass
        except BROKEN:
            raise
        except Exception as error:  # whoever may publish may publish anything; its words may quote the message
            fields = {"action": "control_message_refused", "error": type(error).__name__}
            log.warning("a remote-control message cannot be read", extra=fields)

    def _receive(self, body: dict[str, Any], message: Any) -> None:
        if isinstance(body, dict) and body.get("method") in self._node.handlers:
            self._node.handle_message(body, message)


def ask_all() -> dict[str, dict[str, Any]]:
    """The answers of all launchers and workers to `embedq_status`, by name."""
    return _ask(STATUS, timeout=_ANSWERS_S)


def scale(number: int | None, launcher: str | None = None) -> str:
    """Set a launcher's number of workers; None lets the backlog decide. Returns the launcher's answer.

    InvalidInput if it must be named, does not answer, or refuses.
    """
    if launcher is None:
        found = [name for name in ask_all() if name.startswith(PREFIX)]
        if len(found) != 1:
            raise InvalidInput(f"name one with --launcher: {len(found)} launchers answer {', '.join(sorted(found))}")
        launcher = found[0]
    answers = _ask(SCALE, [launcher], arguments={"number": number}, timeout=_ANSWER_S, limit=1)
    return _answer(launcher, answers)


def drain(worker: str) -> str:
    """Make one worker finish its jobs and end. Returns its answer; InvalidInput if no worker of this name answers."""
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
        raise ServerUnavailable(reason(error)) from None
    return {name: answer for one in answers or [] for name, answer in one.items()}


def _without_state(handler: Callable[..., Any]) -> Callable[..., Any]:
    """kombu calls every handler with its node's state, which ours do not need."""
    return lambda _, **arguments: handler(**arguments)
