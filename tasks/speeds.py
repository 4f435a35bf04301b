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
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from embedq import __version__

WORKERS_KEY, SPEEDS_KEY = "embedq:workers", "embedq:speeds"

#: Seconds between two reports of a worker, and seconds after its last report when it counts as gone: two may be lost.
INTERVAL_S = 5.0
MAX_AGE_S = 3.5 * INTERVAL_S

#: The same between the reports of a worker that holds jobs: senders estimate by them when theirs will be done.
BUSY_INTERVAL_S = 1.0

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
    #: By queue, the mean tokens of a text or passage, and of a character of one, in the latest jobs whose senders say how
    #: many they hold. Empty for workers before 0.2.0.
    tokens_per_text: dict[str, float] = field(default_factory=dict)
    tokens_per_character: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Load:
    """The work that a worker holds at one moment."""

    #: By model, the tokens that wait for a batch, and the part of them that is interactive.
    waiting: dict[str, float] = field(default_factory=dict)
    interactive: float = 0.0
    #: Tokens of a batch; 0 while none is computed.
    batch_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Report:
    """The measurements of one worker at one moment."""

    #: Unix time by the server's clock.
    told_s: float
    models: dict[str, Speed]
    #: Of embedq, in the worker; empty for workers before 0.2.0.
    version: str = ""
    load: Load = field(default_factory=Load)


class Speeds:
    """Publishes and reads reports through one Redis client; `prefix` is the installation's, as on its queues."""

    def __init__(self, client: Any, prefix: str = "") -> None:
        self._client = client
        self._workers, self._latest = prefix + WORKERS_KEY, prefix + SPEEDS_KEY

    def publish(self, worker: str, models: dict[str, Speed], load: Load | None = None) -> None:
        """Publish or renew `worker`'s report. redis.RedisError if the server cannot be reached."""
        report = Report(self._now_s(), models, __version__, load or Load())
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
        return present(self._client.hgetall(self._workers), self._now_s())

    def latest(self) -> dict[str, Speed]:
        """The last measurement of each model, by any worker."""
        return latest(self._client.hgetall(self._latest))

    def _now_s(self) -> float:
        """Unix time by the server's clock: those of hosts may differ by more than a report's age."""
        seconds, microseconds = self._client.time()
        return float(seconds) + float(microseconds) / 1e6


def present(found: Mapping[bytes, bytes], now_s: float) -> dict[str, Report]:
    """The reports of the workers present, by name, of all that are kept; `now_s` is Unix time by the server's clock."""
    reports = {name.decode(errors="replace"): _report(value) for name, value in found.items()}
    return {name: report for name, report in reports.items() if report and _is_present(report, now_s)}


def latest(found: Mapping[bytes, bytes]) -> dict[str, Speed]:
    """The measurements by alias, of all that are kept."""
    speeds = {alias.decode(errors="replace"): _speed(value) for alias, value in found.items()}
    return {alias: speed for alias, speed in speeds.items() if speed}


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
        load = _load(given.get("load", {}))
        return Report(_number(given["told_s"]), models, version if isinstance(version, str) else "", load)
    except _MALFORMED:
        return None


def _speed(value: bytes) -> Speed | None:
    try:
        return _checked(json.loads(value)) if len(value) <= _MAX_BYTES else None
    except _MALFORMED:
        return None


def _checked(given: Any) -> Speed:
    """Read one measurement: fields that are missing or unknown are another version's."""
    sizes = (_numbers(given.get(name, {})) for name in ("tokens_per_job", "tokens_per_text", "tokens_per_character"))
    return Speed(_number(given.get("tokens_per_second", 0.0)), *sizes)


def _load(given: Any) -> Load:
    numbers = (_number(given.get(name, 0.0)) for name in ("interactive", "batch_tokens"))
    return Load(_numbers(given.get("waiting", {})), *numbers)


def _numbers(given: Any) -> dict[str, float]:
    return {str(name): _number(number) for name, number in given.items()}


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
