"""A producer that forks, as gunicorn with `--preload` and uWSGI do: `python -m tests.forking NAME` prints what happens."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embedq import tasks

#: Results that children wait for at once, and seconds after which each is stored.
_NUM_WAITS, _LATENCY_S = 20, 0.2


def in_child(work: Callable[[], Any]) -> Any:
    """What `work` returns in a fork of this process, or "hangs"."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writing, json.dumps(work()).encode())
        except BaseException as error:
            os.write(writing, json.dumps(f"{type(error).__name__}: {error}").encode())
        os._exit(0)
    os.close(writing)
    killer = threading.Timer(60, os.kill, (pid, 9))
    killer.start()
    with os.fdopen(reading, "rb") as answer:
        said = answer.read()
    os.waitpid(pid, 0)
    killer.cancel()
    return json.loads(said) if said else "hangs"


def store_later(ids: list[str]) -> None:
    """Store a result for each job, from another process, as a worker does."""
    if os.fork() == 0:
        for job_id in ids:
            time.sleep(_LATENCY_S)  # how long a job takes
            tasks.app.backend.store_result(job_id, job_id, "SUCCESS")
        os._exit(0)


def waits(prefix: str, get: Callable[[str], Any]) -> dict[str, Any]:
    """Wait for results one after another; how many were right, and the seconds it took."""
    ids = [f"{prefix}-{number}" for number in range(_NUM_WAITS)]
    store_later(ids)
    begun_s = time.monotonic()
    right = sum(get(job_id) == job_id for job_id in ids)
    return {"right": right, "seconds": time.monotonic() - begun_s}


def get(job_id: str) -> Any:
    return tasks.app.AsyncResult(job_id).get(timeout=10)


def aget(job_id: str) -> Any:
    return asyncio.run(tasks.aget(tasks.app.AsyncResult(job_id), timeout=10))


def producer() -> dict[str, Any]:
    """The parent has waited, and waits on while its child does."""
    waits("before", get)
    held = tasks.app.AsyncResult("held")
    kept = threading.Thread(target=lambda: held.get(timeout=30), daemon=True)
    kept.start()
    time.sleep(0.5)  # until it listens, which nothing shows
    child = in_child(lambda: waits("child", get))
    asynchronous = in_child(lambda: waits("async", aget))
    mine = waits("parent", get)
    tasks.app.backend.store_result("held", 1, "SUCCESS")
    kept.join(10)
    return {"child": child, "async": asynchronous, "parent": mine, "held": held.ready()}


def engine() -> dict[str, Any]:
    """The parent has an engine and goes on with it."""
    from embedq.core.engine import Engine
    from tests.checkpoints import FakeModel
    from tests.engines import settings

    model = FakeModel()
    made = Engine({"fake": model}, settings((model,)))
    made.embed(["a text"])

    def closed() -> str:
        made.close()
        return "closed"

    found = {
        "embed": in_child(lambda: np.asarray(made.embed(["a text"])).tolist()),
        "await": in_child(lambda: np.asarray(asyncio.run(made.aembed(["a text"]))).tolist()),
        "is_alive": in_child(lambda: made.is_alive),
        "close": in_child(closed),
        "parent": len(made.embed(["a text"])),
    }
    made.close()
    return found


if __name__ == "__main__":
    print("found", json.dumps({"producer": producer, "engine": engine}[sys.argv[1]]()), flush=True)
