"""The status of a run: completed parts from the target, the others from the queue's server.

States are those of OpenAI's batch object, so that the door's batches are datasets like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import redis

from embedq.tasks.application import app, config, key_prefix
from embedq.tasks.datasets.checking import receipt_in
from embedq.tasks.datasets.manifest import CANCELLED, Manifest
from embedq.tasks.datasets.part_task import PRIORITY
from embedq.tasks.datasets.run_state import DONE, FAILED, MAX_SILENCE_S, RUNNING, Record, RunState
from embedq.tasks.datasets.stores import Store
from embedq.tasks.speeds import Speeds

#: In which nothing more happens by itself.
FINAL = frozenset({"completed", "failed", "cancelled", "expired"})

#: Parts that nobody has told of, whose own receipts are read: the rest only count as rows.
_MAX_UNKNOWN = 64

#: Between the name of a queue and a priority, in the key of its list.
_SEPARATOR = config.broker_transport_options["sep"]

#: Seconds over which speed is measured, up to now.
_LATELY_S = 300.0


@dataclass(frozen=True, slots=True)
class Counts:
    """Parts, or rows."""

    total: int = 0
    completed: int = 0
    running: int = 0
    waiting: int = 0
    failed: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """One run at one moment."""

    state: str
    parts: Counts
    rows: Counts
    #: Rows of completed parts that have no vector.
    failed_rows: int = 0
    tokens: int = 0
    bytes: int = 0
    #: Over the last minutes; 0 before a part was completed.
    rows_per_s: float = 0.0
    tokens_per_s: float = 0.0
    #: At that speed, and None while nobody can tell.
    seconds_left: float | None = None
    began_s: float = 0.0
    #: Failed parts: number -> class and words of the error.
    errors: dict[int, str] = field(default_factory=dict)


def status_of(manifest: Manifest, store: Store, state: RunState) -> Status:
    """Read the target and the server."""
    entries = store.entries()
    done = _done(manifest, entries)
    known, records, now_s = state.known(), state.records(), state.now_s()
    failed = {part: one.error for part, one in records.items() if one.state == FAILED and part not in done}
    told = {part: one.told_s for part, one in records.items() if one.state == RUNNING and part not in done}
    running = {part for part, told_s in told.items() if now_s - told_s < MAX_SILENCE_S}
    sizes = [part.num_rows for part in manifest.parts]
    groups = {"completed": done, "running": running, "failed": set(failed)}
    parts = _counts(len(sizes), {name: len(group) for name, group in groups.items()})
    rows = _counts(sum(sizes), {name: sum(sizes[part] for part in group) for name, group in groups.items()})
    is_cancelled = "cancelled" in known or (not known and store.entry(CANCELLED) is not None)
    finished = {part: one for part, one in records.items() if one.state == DONE and part in done}
    unknown = sorted(done - finished.keys())[:_MAX_UNKNOWN]
    receipts = [receipt for part in unknown if (receipt := receipt_in(store, manifest.name(part)))]
    counted = [(one.failed, one.tokens) for one in finished.values()] + [(one.failed, one.tokens) for one in receipts]
    speed = _speed(finished.values(), [records[part] for part in running], now_s)
    return Status(
        state=_state(parts, is_cancelled, bool(known), state, records, running, sizes),
        parts=parts,
        rows=rows,
        failed_rows=sum(failed for failed, _ in counted),
        tokens=sum(tokens for _, tokens in counted),
        bytes=sum(entries[manifest.name(part)].size for part in done),
        rows_per_s=round(speed[0], 1),
        tokens_per_s=round(speed[1], 1),
        seconds_left=_seconds_left(manifest, rows, speed[0], parts.waiting + parts.running),
        began_s=float(known.get("began_s", 0.0)),
        errors=failed,
    )


def done_parts(manifest: Manifest, store: Store) -> set[int]:
    """Numbers of the parts whose objects are there."""
    return _done(manifest, store.entries())


def _done(manifest: Manifest, names: Iterable[str]) -> set[int]:
    numbers = (manifest.number_of(name) for name in names)
    return {number for number in numbers if number is not None}


def _counts(total: int, groups: dict[str, int]) -> Counts:
    return Counts(total, **groups, waiting=total - sum(groups.values()))


def _state(
    parts: Counts,
    is_cancelled: bool,
    is_known: bool,
    state: RunState,
    records: dict[int, Record],
    running: Collection[int],
    sizes: list[int],
) -> str:
    if parts.completed == parts.total:
        return "completed"
    if is_cancelled:
        return "cancelling" if running else "cancelled"
    if state.is_starting() and not records:
        return "validating"
    if not is_known:
        return "expired"
    if parts.waiting or parts.running:
        is_written = not parts.waiting and all(records[part].rows >= sizes[part] for part in running)
        return "finalizing" if is_written else "in_progress"
    return "failed"


def _speed(finished: Iterable[Record], running: Iterable[Record], now_s: float) -> tuple[float, float]:
    """(rows, tokens) per second of the last minutes; of those that ended, up to the last of them if nothing runs."""
    is_running = False
    lately = [one for one in finished if one.told_s > now_s - _LATELY_S]
    rows, tokens = sum(one.rows for one in lately), sum(one.tokens for one in lately)
    begins, ends = [one.began_s for one in lately], [one.told_s for one in lately]
    for one in running:
        is_running = True
        rows, tokens = rows + one.rows, tokens + one.tokens
        begins.append(one.began_s)
    if not begins or not rows:
        return 0.0, 0.0
    begin_s = max(min(begins), now_s - _LATELY_S)
    seconds = max((now_s if is_running else max(ends)) - begin_s, 0.001)
    return rows / seconds, tokens / seconds


def _seconds_left(manifest: Manifest, rows: Counts, rows_per_s: float, num_left: int) -> float | None:
    """At the speed measured; before there is one, at that of the model's workers, behind all parts that are queued."""
    left = rows.total - rows.completed - rows.failed
    if not left:
        return 0.0
    return round(left / rows_per_s, 1) if rows_per_s else expected_s(manifest.model["alias"], num_left)


def expected_s(alias: str, num_parts: int) -> float | None:
    """Seconds that the model's workers present need for so many parts, or for those that are queued if they are more.

    None before one of them has computed a part.
    """
    with suppress(redis.RedisError):
        prefix = key_prefix(app)
        reports = Speeds(app.backend.client, prefix).present().values()
        present = [report.models[alias] for report in reports if alias in report.models]
        per_second, queue = sum(one.tokens_per_second for one in present), config.parts_queue(alias)
        sizes = [one.tokens_per_job[queue] for one in present if queue in one.tokens_per_job]
        if per_second and sizes:
            num_queued = int(app.backend.client.llen(f"{prefix}{queue}{_SEPARATOR}{PRIORITY}"))
            return round(max(num_parts, num_queued) * sum(sizes) / len(sizes) / per_second, 1)
    return None
