"""A worker under a supervisor of one's own: listens to Celery's signals, then serves.

Started by tests as `python -m tests.noting_worker`. Prints a line per signal of a job.
"""

from __future__ import annotations

import sys
from typing import Any

from celery import signals

from embedq.workers import worker

#: Signals of a job in a worker, and where each carries the job's id.
_OF_A_JOB = (
    "task_received",
    "task_prerun",
    "task_success",
    "task_failure",
    "task_retry",
    "task_revoked",
    "task_postrun",
)


def main() -> int:
    """Connect, then run a worker; returns its exit code."""
    for name in _OF_A_JOB:
        getattr(signals, name).connect(_printer(name), weak=False)
    return worker.main()


def _printer(name: str) -> Any:
    def note(sender: Any, **fields: Any) -> None:
        request: Any = fields.get("request") or getattr(sender, "request", None)
        job_id = fields.get("task_id") or request.id
        kind = type(fields.get("result", fields.get("exception"))).__name__
        print(f"signal={name} job={job_id} sender={getattr(sender, 'name', '-')} kind={kind} ", flush=True)

    return note


if __name__ == "__main__":
    sys.exit(main())
