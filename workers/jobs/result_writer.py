"""Writes results to Redis by one atomic script, and keeps them until they are written.

Input: keys and blobs, in the order they were stored. Output: each blob at its key, and published on the channel of the
same name. A stored SUCCESS stays, and so does the answer of whoever cancelled the job (`tasks/cancelling.py`): the script
reads and writes in one step, so that of two that race one result remains and is published. Knows nothing of jobs; of a
blob it knows that the status comes first.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import redis

from embedq.core.errors import ServerUnavailable

log = logging.getLogger(__name__)

#: KEYS: keys of results. ARGV: seconds to live (0 for ever) and blob of each, in pairs. Returns how
#: many were stored. Only the beginning of what is stored is looked at: Celery packs the status
#: first, and a result of megabytes need not be decoded to see it.
_STORE = """
local num_stored = 0
for i, key in ipairs(KEYS) do
    local head = redis.pcall('GETRANGE', key, 0, 25)
    local is_final = type(head) == 'string'
        and (string.sub(head, 2, 16) == '\\166status\\167SUCCESS' or string.sub(head, 1, 20) == '{"status": "SUCCESS"'
            or string.sub(head, 2) == '\\166status\\167REVOKED\\169cancelled')
    if not is_final then
        local seconds, blob = ARGV[2 * i - 1], ARGV[2 * i]
        if seconds == '0' then
            redis.call('SET', key, blob)
        else
            redis.call('SET', key, blob, 'EX', seconds)
        end
        redis.call('PUBLISH', key, blob)
        num_stored = num_stored + 1
    end
end
return num_stored
"""

#: Bytes of results in one call of the script. Bounds what the server copies while it serves nobody
#: else (some milliseconds); one-text results reach it at some thousands.
_MAX_CALL_BYTES = 8 * 1024 * 1024

#: Seconds between two tries: the first pause, and the longest it doubles to.
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.05, 2.0


class UnwrittenResult(NamedTuple):
    """One result: its key, its time to live and its blob."""

    key: bytes
    #: Seconds it is kept; 0 for ever.
    lives_s: int
    blob: bytes


class UnwrittenResults:
    """The results that are not in Redis yet, in the order they were stored."""

    def __init__(self, client: Any) -> None:
        self._store = client.register_script(_STORE)
        self._results: deque[UnwrittenResult] = deque()
        self._keys: set[bytes] = set()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._results)

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def add(self, key: bytes, lives_s: int, blob: bytes) -> None:
        """Keep one more until it is written; `lives_s` is its time to live in Redis, 0 for ever."""
        self._results.append(UnwrittenResult(key, lives_s, blob))
        self._keys.add(key)
        self.num_bytes += len(blob)

    def write(self) -> None:
        """Store and publish all, in one call of the script unless they are large. redis.RedisError if it fails."""
        while self._results:
            call = self._next_call()
            pairs = [part for result in call for part in (result.lives_s, result.blob)]
            self._store(keys=[result.key for result in call], args=pairs)
            for _ in call:  # only now: what could not be written stays held
                self.num_bytes -= len(self._results.popleft().blob)
        self._keys.clear()

    def clear(self) -> None:
        """Drop what could not be written: its jobs are not acknowledged and run again."""
        self._results.clear()
        self._keys.clear()
        self.num_bytes = 0

    def _next_call(self) -> list[UnwrittenResult]:
        call: list[UnwrittenResult] = []
        num_bytes = 0
        for result in self._results:
            num_bytes += len(result.blob)
            if call and num_bytes > _MAX_CALL_BYTES:
                break
            call.append(result)
        return call

    def retry(self, attempt: Callable[[], None], max_outage_s: float) -> None:
        """Call `attempt` until it succeeds. ServerUnavailable if the server still fails after `max_outage_s`.

        Every error of the server is retried, also that its memory is full: the results are worth the wait, and an
        operator who reads the warnings can fix it meanwhile.
        """
        deadline_s, pause_s = time.monotonic() + max_outage_s, _FIRST_PAUSE_S
        while True:
            try:
                return attempt()
            except (redis.RedisError, OSError) as error:
                if time.monotonic() >= deadline_s:
                    raise ServerUnavailable(
                        f"{len(self):,} results could not be stored for {max_outage_s:.0f} s "
                        f"({type(error).__name__}); their jobs must not be acknowledged"
                    ) from error
                self._warn(error, pause_s)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_PAUSE_S)

    def _warn(self, error: Exception, pause_s: float) -> None:
        log.warning(
            "results wait until the server can be written to",
            extra={
                "action": "results_wait",
                "num_results": len(self),
                "num_bytes": self.num_bytes,
                "error": f"{type(error).__name__}: {error}",
                "again_in_s": pause_s,
            },
        )
