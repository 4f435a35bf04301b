"""The speeds of the workers present: each publishes its own every few seconds, exporter and launchers read them.

    embedq:workers    hash    worker's name -> JSON of `Report`; each worker renews its own. The key is gone an hour
                              after the last of them
    embedq:speeds     hash    model -> JSON of `Speed`, the latest that any worker measured; kept, so that a pool at
                              zero still knows how long one worker would take

It does not use remote control (`inspect embedq_stats`), which would query every worker's event loop at each scrape,
wait its whole timeout for a worker that is gone, and need the right to publish and to make reply queues. This is one
read of two keys, its size bounded by the number of workers, and the report of a worker that hangs expires by itself.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from embedq import __version__

WORKERS_KEY, SPEEDS_KEY = "embedq:workers", "embedq:speeds"

#: Seconds between two reports of a worker, and seconds after its last report when it counts as gone: two may be lost.
INTERVAL_S = 5.0
MAX_AGE_S = 3.5 * INTERVAL_S

#: Seconds after the last report when the key expires, with what dead workers left in it.
_EXPIRES_S = 3600

#: A larger report is ignored; ours have some hundred bytes per model, but anybody who may write could write more.
_MAX_BYTES = 64 * 1024

#: Errors of reading a record that is none of ours.
_MALFORMED = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class Speed:
    """One worker's measurement of one model."""

    #: Tokens without padding in a second in which there was work for the model; 0 before there was enough.
    tokens_per_second: float = 0.0
    #: By queue of the model, the mean tokens of its latest jobs.
    tokens_per_job: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """The measurements of one worker at one moment."""

    #: Unix time by the server's clock.
    told_s: float
    models: dict[str, Speed]
    #: Of embedq, in the worker; empty for workers before 0.2.0.
    version: str = ""


class Speeds:
    """Publishes and reads reports through one Redis client; `prefix` is the installation's, as on its queues."""

    def __init__(self, client: Any, prefix: str = "") -> None:
        self._client = client
        self._workers, self._latest = prefix + WORKERS_KEY, prefix + SPEEDS_KEY

    def publish(self, worker: str, models: dict[str, Speed]) -> None:
        """Publish or renew `worker`'s report. redis.RedisError if the server cannot be reached."""
        report = Report(self._now_s(), models, __version__)
        measured = {alias: json.dumps(asdict(one)) for alias, one in models.items() if one.tokens_per_second}
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hset(self._workers, worker, json.dumps(asdict(report)))
            pipe.expire(self._workers, _EXPIRES_S)
            if measured:
                pipe.hset(self._latest, mapping=measured)
            pipe.execute()

    def withdraw(self, worker: str) -> None:
        """Remove `worker`'s report: it takes no jobs any more."""
        self._client.hdel(self._workers, worker)

    def tidy(self) -> None:
        """Remove the reports of workers that died without withdrawing them; called by each that starts."""
        now_s = self._now_s()
        found = self._client.hgetall(self._workers)
        gone = [name for name, value in found.items() if not _is_present(_report(value), now_s)]
        if gone:
            self._client.hdel(self._workers, *gone)

    def present(self) -> dict[str, Report]:
        """The reports of the workers present, by name."""
        now_s = self._now_s()
        found = {
            name.decode(errors="replace"): _report(value) for name, value in self._client.hgetall(self._workers).items()
        }
        return {name: report for name, report in found.items() if report and _is_present(report, now_s)}

    def latest(self) -> dict[str, Speed]:
        """The last measurement of each model, by any worker."""
        found = {
            alias.decode(errors="replace"): _speed(value) for alias, value in self._client.hgetall(self._latest).items()
        }
        return {alias: speed for alias, speed in found.items() if speed}

    def _now_s(self) -> float:
        """Unix time by the server's clock: those of hosts may differ by more than a report's age."""
        seconds, microseconds = self._client.time()
        return float(seconds) + float(microseconds) / 1e6


def known_speeds(given: Any) -> dict[str, Speed]:
    """The speeds of a map by alias, as another process wrote it; those that cannot be read are left out."""
    found = given.items() if isinstance(given, dict) else ()
    return {str(alias): speed for alias, one in found if (speed := _speed_of(one))}


def _is_present(report: Report | None, now_s: float) -> bool:
    return report is not None and now_s - report.told_s < MAX_AGE_S


def _report(value: bytes) -> Report | None:
    """Read one report; None if it is malformed."""
    try:
        given = json.loads(value) if len(value) <= _MAX_BYTES else {}
        version = given.get("version", "")
        models = {str(alias): _checked(one) for alias, one in given["models"].items()}
        return Report(_number(given["told_s"]), models, version if isinstance(version, str) else "")
    except _MALFORMED:
        return None


def _speed(value: bytes) -> Speed | None:
    try:
        return _checked(json.loads(value)) if len(value) <= _MAX_BYTES else None
    except _MALFORMED:
        return None


def _checked(given: Any) -> Speed:
    """Read one measurement: fields that are missing or unknown are another version's."""
    sizes = {str(queue): _number(size) for queue, size in given.get("tokens_per_job", {}).items()}
    return Speed(_number(given.get("tokens_per_second", 0.0)), sizes)


def _speed_of(given: Any) -> Speed | None:
    try:
        return _checked(given)
    except _MALFORMED:
        return None


def _number(given: Any) -> float:
    """ValueError unless it is finite: JSON as Python reads it has NaN, and a report of an infinite time never expires."""
    number = float(given)
    if not math.isfinite(number):
        raise ValueError("not a finite number")
    return number
