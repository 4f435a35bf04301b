"""Checks the type of each field of a message that Celery acts on, before Celery makes a job of it.

Celery trusts a message. A field of another type stops the job half-way, after it was acknowledged and before
anything was stored, or before anybody would give it back: its producer then waits for ever. Checked here, the job
fails with an error. Knows nothing of what a job's arguments mean.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from celery.exceptions import InvalidTaskError

#: Numbers beyond this cannot be stored with a result.
_MAX_INTEGER = 2**63 - 1

Check = Callable[[Any], bool]


class Misshapen(InvalidTaskError):
    """A field has a type that no job has. Names the field, never its value."""


def check_shape(headers: Mapping[str, Any], body: Any, properties: Mapping[str, Any]) -> None:
    """Raise Misshapen if a field of a message has a type that no producer sends.

    `body` is decoded: arguments, keywords and what follows the job.
    """
    if not isinstance(headers.get("id"), str) or not headers["id"]:
        raise Misshapen("the message's header id must be a text: a result is stored under it")
    _check_fields("header", headers, _HEADERS)
    _check_fields("property", properties, _PROPERTIES)
    if not isinstance(body, list | tuple) or len(body) != 3:
        raise Misshapen("the message's body must be a list of arguments, keywords and what follows the job")
    args, kwargs, follows = body
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict) or not all(map(_is_text, kwargs)):
        raise Misshapen("the message's arguments must be a list, and its keywords a map")
    if not _is_map_or_none(follows) or not _FOLLOWS.keys() >= (follows or {}).keys():
        raise Misshapen("the message's third part must be a map of what follows the job")
    _check_fields("field", follows or {}, _FOLLOWS)


def _check_fields(noun: str, fields: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    for name, is_right in checks.items():
        value = fields.get(name)
        if value is not None and not is_right(value):
            raise Misshapen(f"the message's {noun} {name} has a wrong type: {type(value).__name__}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value <= _MAX_INTEGER


def _is_priority(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 255


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)


def _is_map_or_none(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_text, value))


def _are_limits(value: Any) -> bool:
    """A hard and a soft limit in seconds, either of them None."""
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_limit, value))


def _is_limit(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and 0 <= value <= _MAX_INTEGER)


def _are_signatures(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_signature, value))


def _is_signature(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("task"), str)


_HEADERS: dict[str, Check] = {
    "root_id": _is_text,
    "parent_id": _is_text,
    "group": _is_text,
    "group_index": _is_count,
    "shadow": _is_text,
    "argsrepr": _is_text,
    "kwargsrepr": _is_text,
    "origin": _is_text,
    "eta": _is_text,
    "expires": _is_text,
    "retries": _is_count,
    "replaced_task_nesting": _is_count,
    "timelimit": _are_limits,
    "ignore_result": _is_flag,
    "stamped_headers": _are_texts,
    "stamps": _is_map,
}

_PROPERTIES: dict[str, Check] = {"priority": _is_priority, "correlation_id": _is_text, "reply_to": _is_text}

_FOLLOWS: dict[str, Check] = {
    "callbacks": _are_signatures,
    "errbacks": _are_signatures,
    "chain": _are_signatures,
    "chord": _is_signature,
}
