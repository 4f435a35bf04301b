"""The models that the pool serves: workers announce them in Redis, producers look them up.

    embedq:models     hash   alias -> JSON of `Served`; kept when workers stop, since a queue outlives
                             them and a pool may be scaled to zero

So a producer refuses an unknown model at the call; otherwise a job with a typo would wait for ever in a queue that no
worker consumes. As long as no worker has announced anything, every name is accepted.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any

import redis

from embedq.core.errors import InvalidInput, InvalidSettings, UnknownModel

KEY = "embedq:models"

#: A larger announcement is ignored; ours have some hundred bytes.
_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Served:
    """What a worker announces of a model."""

    alias: str
    #: Directory or hub name it was loaded from, and revision.
    source: str
    #: Of "embed", "rerank": what it can do.
    kinds: list[str]
    dimensions: int
    max_length: int
    outputs: list[str]
    #: Of "embed", "rerank": jobs that name no model.
    default_for: list[str]
    #: Of embedq, in the worker that announced it; empty for workers before 0.2.0.
    version: str = ""


class Registry:
    """The announced models, through one Redis client. Caches what it has read."""

    def __init__(self, client: Any, prefix: str = "") -> None:
        """`prefix` is the installation's, as on its queues: two with prefixes of their own may share a server."""
        self._client = client
        self._key = prefix + KEY
        self._seen: dict[str, Served] = {}

    def all(self) -> dict[str, Served]:
        """Read every announced model, by alias; malformed announcements are ignored."""
        found = {
            alias.decode(errors="replace"): _read(value) for alias, value in self._client.hgetall(self._key).items()
        }
        self._seen = {alias: model for alias, model in found.items() if model}
        return self._seen

    def check(self, kind: str, alias: str | None) -> None:
        """Raise UnknownModel or InvalidInput for a job that no worker would ever take.

        `kind` is "embed" or "rerank"; without `alias` a default model for it must exist. A server
        that does not answer is left to the publish, which retries and has the better error.
        """
        if _can(self._seen, kind, alias):
            return
        try:
            known = self.all()
        except redis.RedisError:
            return
        if not known or _can(known, kind, alias):
            return
        names = ", ".join(sorted(known))
        if alias is None:
            raise UnknownModel(f"{kind} needs model=…: none of the announced models is its default: {names}")
        if alias in known:
            raise InvalidInput(f"model {alias} cannot {kind}; it can {' and '.join(known[alias].kinds)}")
        raise UnknownModel(
            f"unknown model {alias!r:.70}; workers have announced {names}. "
            "Start a worker that serves it before sending it work."
        )

    def announce(self, models: list[Served]) -> None:
        """Announce what a worker serves. InvalidSettings if another model is the default already.

        Two defaults would put vectors of two models into one result set, which nobody notices until
        search results are nonsense.
        """
        known = self.all()
        for model in models:
            for kind in model.default_for:
                rival = next(
                    (one for one in known.values() if kind in one.default_for and one.alias != model.alias), None
                )
                if rival:
                    raise InvalidSettings(
                        f"model {model.alias!r} would become the default for {kind}, but {rival.alias!r} is. "
                        f"Set EMBEDQ_DEFAULT_{kind.upper()}=none to serve it by name only; if {rival.alias!r} is "
                        f"gone for good, run `embedq forget {rival.alias}`"
                    )
        self._client.hset(self._key, mapping={model.alias: json.dumps(asdict(model)) for model in models})

    def forget(self, alias: str) -> bool:
        """Remove an announcement; False if there was none. Workers announce again when they start."""
        return bool(self._client.hdel(self._key, alias))


def _read(value: bytes) -> Served | None:
    """Read one announcement; None if it is malformed. Unknown fields come from a newer worker and are ignored."""
    try:
        given = json.loads(value) if len(value) <= _MAX_BYTES else {}
        known = {field.name: given[field.name] for field in fields(Served) if field.name in given}
        model = Served(**known)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    names = (model.kinds, model.outputs, model.default_for)
    are_lists = all(isinstance(one, list) and all(isinstance(name, str) for name in one) for one in names)
    are_numbers = type(model.dimensions) is int and type(model.max_length) is int
    are_texts = all(isinstance(one, str) for one in (model.alias, model.source, model.version))
    return model if are_lists and are_numbers and are_texts else None


def _can(known: dict[str, Served], kind: str, alias: str | None) -> bool:
    if alias is None:
        return any(kind in model.default_for for model in known.values())
    return alias in known and kind in known[alias].kinds
