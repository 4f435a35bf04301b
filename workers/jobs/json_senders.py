"""For senders that speak JSON and have nothing of ours: their answers, and what their own tasks get from us.

header embedq-answer: json    the job's result is stored as JSON; by default it is msgpack, whatever the message was
a message in JSON             what follows the job, a chain, a callback or a chord's body, is sent on in JSON
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from celery import states
from celery.app.task import Context

from embedq.core import errors
from embedq.core.codec import json_form
from embedq.tasks.connect import all_signatures, sent_by_us

#: The message's header, and its value.
HEADER, JSON = "embedq-answer", "json"

_CONTENT_TYPE = "application/json"

#: The class of every error of ours in an answer in JSON: Celery in a process without ours finds no class of another name,
#: and would make a new one for each error, which nobody can catch.
_ERROR = {"exc_module": "celery.exceptions", "exc_type": "TaskError"}


def wants_json(request: Context | None) -> bool:
    """Returns True if the sender of a job asked for its answer in JSON."""
    headers = getattr(request, "headers", None)
    return isinstance(headers, Mapping) and headers.get(HEADER) == JSON


def in_json(meta: dict[str, Any]) -> bytes:
    """The result map of a job as JSON. An error of ours is `celery.exceptions.TaskError`, "InvalidInput: …"."""
    if meta["status"] in states.PROPAGATE_STATES:
        meta = meta | {"result": _told(meta["result"])}
    return json.dumps(json_form(meta)).encode()  # in Celery's form, by which the writer knows a success


def _told(error: dict[str, Any]) -> dict[str, Any]:
    name, message = error["exc_type"], error["exc_message"]
    if error.get("exc_module") != errors.__name__:
        return error
    return _ERROR | {"exc_message": [f"{name}: {message[0] if message else ''}"], "error": name}


def follow_in_json(message: Any, follows: Any) -> None:
    """Have the tasks that follow a job that came in JSON sent on in JSON by us, unless their signatures say otherwise.

    `follows` is the third part of the body, changed in place. A connected application says otherwise (`tasks.connect`).
    """
    if message.content_type != _CONTENT_TYPE or not isinstance(follows, dict):
        return
    with suppress(RecursionError):  # of a message made to cause one
        for signature in sent_by_us(follows):
            _set(signature, "options", serializer=JSON)
        if (message.headers or {}).get(HEADER) != JSON:
            return
        for signature in all_signatures(list(follows.values())):
            # If the job fails, we store the failure of all that would have followed as well.
            _set(signature.setdefault("options", {}), "headers", **{HEADER: JSON})


def _set(fields: Any, name: str, **given: str) -> None:
    """Set in the map `fields[name]` what is not set yet; anything else that arrived there is left as it is."""
    if isinstance(fields, dict) and isinstance(found := fields.setdefault(name, {}), dict):
        fields[name] = {**given, **found}
