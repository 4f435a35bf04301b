"""The models that the pool serves: workers announce them in Redis, producers look them up.

    embedq:models     hash   alias -> JSON of `Served`; kept when workers stop, since a queue outlives
                             them and a pool may be scaled to zero. Workers renew their own; one that
                             no worker has served for thirty days counts as gone

Workers that take jobs of one model share its queue, so their vectors must be of one revision: what the files hold
(`core.checkpoint.content_hash`) and how they are read. A worker of another revision is refused while workers of the
announced one are present (`tasks.speeds`). The exception is a rolling revision: a worker that may replace
(`EMBEDQ_REPLACE_REVISION`, and every successor of a launcher's rolling restart) and has the same dimensions, kinds and
outputs. Its results name their revision, as all do.

So a producer refuses an unknown model at the call; otherwise a job with a typo would wait for ever in a queue that no
worker consumes. As long as no worker has announced anything, every name is accepted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import redis

from embedq import celeryconfig as config
from embedq.core.errors import InvalidInput, InvalidSettings, UnknownModel
from embedq.tasks.speeds import MAX_AGE_S, WORKERS_KEY

KEY = "embedq:models"

#: The model of a default queue for which none is announced.
UNKNOWN = "unknown"

#: Checks and announces in one step: of workers that start together each sees what the one before it announced.
_ANNOUNCE = Path(__file__).with_name("announce.lua").read_text(encoding="utf-8")

#: Seconds after its last worker when an announcement expires. Long, because a pool may be scaled to zero: once its model
#: is refused no job can bring it back, and somebody must start a worker.
EXPIRES_S = 30 * 86_400

#: Age at which a worker renews its announcements: few writes, also of a thousand workers.
RENEWS_AFTER_S = 3_600

#: Seconds for which a producer goes by what it has read: so long it may send to a model that was withdrawn.
FRESH_S = 60.0

#: A larger announcement is ignored; ours have some hundred bytes.
_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Served:
    """A worker's announcement of one model."""

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
    #: Revision it was asked for by, and what its files hold (`core.checkpoint.content_hash`); empty where unknown.
    revision: str = ""
    content: str = ""
    #: How its files are read: a hash of the settings that change its numbers; empty where unknown.
    reading: str = ""
    #: Arithmetic in use, empty where unknown, and whether the device chose it: `precision = "auto"`.
    precision: str = ""
    is_auto: bool = False
    #: Unix time by the server's clock when a worker that serves it last said so. 0 from a worker that does not renew what
    #: it announces: it counts until the whole key expires.
    renewed_s: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        """All that may differ between two models of one alias."""
        asked = f" at revision {self.revision}" if self.revision else ""
        read = f", read as {self.reading}" if self.reading else ""
        computed = f", in {self.precision}" if self.precision else ""
        return (
            f"{self.source}{asked} ({self.dimensions} dimensions, {'+'.join(self.outputs)}, "
            f"content {self.content[:12] or 'unknown'}{read}{computed})"
        )

    def is_expired(self, now_s: float) -> bool:
        """Returns True if no worker has served it for so long that it counts as gone."""
        return 0 < self.renewed_s < now_s - EXPIRES_S


class Registry:
    """The announced models, through one Redis client. Goes by what it has read for a minute."""

    def __init__(self, client: Any, prefix: str = "") -> None:
        """`prefix` is the installation's, as on its queues: two with prefixes of their own may share a server."""
        self._client = client
        self._key, self._workers_key = prefix + KEY, prefix + WORKERS_KEY
        self._seen: dict[str, Served] = {}
        self._fresh_until_s = 0.0

    def all(self) -> dict[str, Served]:
        """Read every announced model, by alias; malformed and expired announcements are ignored."""
        return self._all_at()[0]

    def _all_at(self) -> tuple[dict[str, Served], float]:
        """Every announced model, and the moment by the server's clock."""
        with self._client.pipeline(transaction=False) as pipe:
            (seconds, microseconds), values = pipe.time().hgetall(self._key).execute()
        now_s = seconds + microseconds / 1e6
        self._seen = read_all(values, now_s)
        self._fresh_until_s = time.monotonic() + FRESH_S
        return self._seen, now_s

    def check(self, kind: str, alias: str | None) -> None:
        """Raise UnknownModel or InvalidInput for a job that no worker would ever take.

        `kind` is "embed" or "rerank"; without `alias` a default model for it must exist. A server
        that does not answer is left to the publish, which retries and has the better error.
        """
        if time.monotonic() < self._fresh_until_s and _can(self._seen, kind, alias):
            return
        try:
            known = self.all()
        except redis.RedisError:  # for a minute, or each job would wait for an absent server twice
            self._fresh_until_s = time.monotonic() + FRESH_S
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

    def announce(self, models: list[Served], worker: str = "", may_replace: bool = False) -> None:
        """Announce what `worker` serves, and that it is present. InvalidSettings if that contradicts another worker.

        Two defaults, or two revisions of one alias, would put vectors of two models into one result set, which nobody
        notices until search results are nonsense. `may_replace` admits another revision of the same dimensions.
        """
        seconds, microseconds = self._client.time()
        dated = [replace(model, renewed_s=seconds + microseconds / 1e6) for model in models]
        found = self._client.register_script(_ANNOUNCE)(
            keys=[self._key, self._workers_key],
            args=[worker, MAX_AGE_S, int(may_replace), EXPIRES_S, *(json.dumps(asdict(model)) for model in dated)],
        )
        if found:
            why, alias, *rest = (one.decode(errors="replace") if isinstance(one, bytes) else one for one in found)
            new = next(model for model in models if model.alias == alias)
            raise _REFUSALS[why](new, *rest)

    def renew(self, models: list[Served], worker: str = "", may_replace: bool = False) -> None:
        """Announce again what `worker` serves, where the server has lost it or it was not renewed for an hour.

        Another revision of one of them is left alone: it expires unless workers of its own renew it. InvalidSettings as from
        `announce`.
        """
        self._client.expire(self._key, EXPIRES_S)
        known, now_s = self._all_at()
        if due := [model for model in models if _is_due(model, known, now_s)]:
            self.announce(due, worker, may_replace)

    def forget(self, alias: str) -> bool:
        """Remove an announcement; False if there was none. Workers announce again when they start."""
        return bool(self._client.hdel(self._key, alias))


def read_all(found: Mapping[bytes, bytes], now_s: float) -> dict[str, Served]:
    """The announced models by alias, of all that is kept; malformed and expired announcements are left out."""
    models = {alias.decode(errors="replace"): _read(value) for alias, value in found.items()}
    return {alias: model for alias, model in models.items() if model and not model.is_expired(now_s)}


def queues_of(models: Mapping[str, Served]) -> dict[str, tuple[str, str]]:
    """(model, kind) by queue: the queues of each model, as its workers serve them, and those of the defaults."""
    queues = {config.queue_name(kind, alias): (alias, kind) for alias in models for kind in ("embed", "rerank")}
    queues |= {config.parts_queue(alias): (alias, "part") for alias in models}
    for kind in ("embed", "rerank"):
        default = next((alias for alias, model in models.items() if kind in model.default_for), UNKNOWN)
        queues[config.queue_name(kind)] = default, kind
    return queues


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
    are_numbers = are_numbers and type(model.renewed_s) in (int, float) and math.isfinite(model.renewed_s)
    texts = (model.alias, model.source, model.version, model.revision, model.content, model.reading, model.precision)
    are_texts = all(isinstance(one, str) for one in texts)
    return model if are_lists and are_numbers and are_texts else None


def _is_due(ours: Served, known: Mapping[str, Served], now_s: float) -> bool:
    """Returns True if an announcement is lost, or ours and old."""
    found = known.get(ours.alias)
    if found is None:
        return True
    is_ours = (found.content, found.reading) == (ours.content, ours.reading)
    return is_ours and now_s - found.renewed_s >= RENEWS_AFTER_S


def _two_defaults(new: Served, kind: str, rival: str) -> InvalidSettings:
    return InvalidSettings(
        f"model {new.alias!r} would become the default for {kind}, but {rival!r} is. "
        f"Set EMBEDQ_DEFAULT_{kind.upper()}=none to serve it by name only; if {rival!r} is "
        f"gone for good, run `embedq forget {rival}`"
    )


def _two_revisions(new: Served, worker: str, difference: str, announced: str) -> InvalidSettings:
    old = _read(announced.encode()) or "a malformed announcement"
    cure = (
        "To replace it while both run, send the launcher SIGHUP or start this worker with EMBEDQ_REPLACE_REVISION=true"
        if difference == "revision"
        else "Their vectors cannot be mixed, so this cannot be a rolling revision"
    )
    return InvalidSettings(
        f"model {new.alias!r} is {new}, but worker {worker} serves {old} under that alias. {cure}; or choose another "
        "alias, or stop the other workers first"
    )


def _two_precisions(new: Served, worker: str, announced: str) -> InvalidSettings:
    old = _read(announced.encode())
    return InvalidSettings(
        f"precision=auto is {new.precision} on this device, but worker {worker} serves model {new.alias!r} in "
        f"{old.precision if old else 'another'}, and their vectors would be mixed. Set the model's precision to one of the two "
        "on all workers, or choose another alias"
    )


#: What a script's refusal means, by its first word.
_REFUSALS: dict[str, Callable[..., InvalidSettings]] = {
    "default": _two_defaults,
    "revision": _two_revisions,
    "precision": _two_precisions,
}


def _can(known: dict[str, Served], kind: str, alias: str | None) -> bool:
    if alias is None:
        return any(kind in model.default_for for model in known.values())
    return alias in known and kind in known[alias].kinds
