"""Decides when bulk work goes before interactive work. Pure policy, the same at every stage: fetch, encode, device.

Interactive work goes first. Bulk that was passed over for `max_bulk_wait_s` gets one turn, then interactive work comes
first again: an hour of bulk takes one turn now and then, however long it has waited. A turn is one fetch of at most a
batch's worth, one slice to encode, or one batch.
"""

from __future__ import annotations


class BulkShare:
    """The clock of one stage. Not thread-safe: the caller holds a lock, or is the only one."""

    def __init__(self, max_bulk_wait_s: float) -> None:
        self._max_bulk_wait_s = max_bulk_wait_s
        #: Since when bulk is passed over; None while it is not.
        self._passed_over_s: float | None = None

    def is_due(self, now_s: float) -> bool:
        """Returns True if bulk goes first now. Asked only while both classes could go; the first time starts the clock."""
        if self._passed_over_s is None:
            self._passed_over_s = now_s
        return now_s - self._passed_over_s >= self._max_bulk_wait_s

    def restart(self) -> None:
        """Record that bulk is not passed over: it got a turn, or none of it could go."""
        self._passed_over_s = None
