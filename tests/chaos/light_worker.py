"""Real workers over a model that costs nothing, kept running by a process that has imported everything once.

`python -m tests.chaos.light_worker 5` forks five workers and another for each that dies. A fork is a
process like any other to the kernel and to the server, but is ready in a tenth of a second, so that
hundreds can be killed in a minute. All of a worker is real (`workers.worker.main`) except its model.

What a worker does is noted outside Redis, in one file per process, so that losses and repetitions can
be proved: see `tests/chaos/notes.py`. Settings, beside the worker's own:

    CHAOS_NOTES      directory of the notes
    CHAOS_PASS_S     seconds one pass of the model takes
    CHAOS_PROXY_URL  how the first worker reaches the server; the others go by EMBEDQ_REDIS_URL
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from celery import signals

from embedq import core, tasks
from embedq.core.engine import Engine
from embedq.core.settings import Settings
from embedq.workers import worker
from embedq.workers.broker import leases
from embedq.workers.monitoring.heartbeat import Heart
from tests.chaos.notes import Notes
from tests.checkpoints import FakeModel

#: The only model's name.
ALIAS = "light"

#: A text that begins like this is a fault in native code: the process is gone, without a word.
DEADLY = "segfault"

#: The only token of what the engine makes up itself, as a text.
_MADE_UP = "\1"

#: Seconds that workers have to finish before they are killed.
_DRAIN_S = 20


class LightModel(FakeModel):
    """Answers at once or after a chosen time, notes what it computes, and dies of some texts."""

    def __init__(self, notes: Notes, pass_s: float) -> None:
        super().__init__(ALIAS)
        self._notes, self._pass_s = notes, pass_s

    def launch(self, batch: list[Any], wanted: Any) -> Any:
        self.batches.clear()  # kept for tests that look at them; here they would only grow
        self.steps.clear()
        texts = [bytes(one.tokens.ids.tolist()).decode(errors="replace") for one in batch]
        # What the engine makes up itself, to warm up and to see whether the model is well, is of no job. At every start
        # a worker would note a whole batch of it, and each would count as texts computed again.
        self._notes.computed([text for text in texts if text.strip(_MADE_UP)])
        if any(text.startswith(DEADLY) for text in texts):
            signal.raise_signal(signal.SIGSEGV)  # to this thread: by `os.kill` it could finish the batch meanwhile
        time.sleep(self._pass_s)  # what an accelerator does meanwhile; no event ends it
        return super().launch(batch, wanted)


def serve(slot: int, environment: Mapping[str, str]) -> int:
    """Be worker number `slot` until told to stop; returns the exit code."""
    notes = Notes(Path(environment["CHAOS_NOTES"]), slot)
    model = LightModel(notes, float(environment.get("CHAOS_PASS_S", "0")))
    if slot == 0 and "CHAOS_PROXY_URL" in environment:
        url = environment["CHAOS_PROXY_URL"]
        tasks.app.conf.update(broker_url=url, result_backend=url)
    os.environ["EMBEDQ_DEVICE_LABEL"] = f"slot{slot}"

    def load_all(settings: Settings) -> Engine:
        engine = Engine({ALIAS: model}, settings)
        end_threads_on_request(engine, Path(environment["CHAOS_NOTES"]).parent / f"end-{os.getpid()}")
        return engine

    def note(request: Any, **_: Any) -> None:
        notes.received(request.message.delivery_tag, request.id)

    core.load_all = load_all
    signals.task_received.connect(note)
    return worker.main()


def end_threads_on_request(engine: Engine, place: Path) -> None:
    """On SIGUSR2, end the thread that the file `place` names, as an error of its own would."""

    def end(*_: object) -> None:
        name = place.read_text()
        if name.startswith("encode"):
            _raise_once(engine.encoding, "_add", SystemError("chaos"))
        elif name == "lease renewal":
            _raise_once(leases, "renew", SystemExit())
        elif name == "heartbeat":
            _raise_once(Heart, "_send", SystemExit())
        else:
            _end_thread(name)

    signal.signal(signal.SIGUSR2, end)


def _end_thread(name: str) -> None:
    """End a thread at whatever it does. It may leave a lock locked for ever, so this is for threads that end the process."""
    for thread in threading.enumerate():
        if thread.name == name and thread.ident:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def _raise_once(owner: Any, name: str, error: BaseException) -> None:
    """Let the next call of a function raise `error`."""
    function = getattr(owner, name)

    def fail(*_: Any) -> None:
        setattr(owner, name, function)
        raise error

    setattr(owner, name, fail)


def main(num_workers: int) -> None:
    """Keep `num_workers` running until SIGTERM, then let them finish."""
    slots: dict[int, int] = {}
    signal.signal(signal.SIGTERM, _stop)
    try:
        for slot in range(num_workers):
            slots[_fork(slot)] = slot
        while True:
            pid, status = os.wait()
            slot = slots.pop(pid)
            print(f"action=light_worker_ended pid={pid} status={os.waitstatus_to_exitcode(status)} ", flush=True)
            slots[_fork(slot)] = slot
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _end(list(slots))


def _fork(slot: int) -> int:
    if pid := os.fork():
        return pid
    code = 1  # what Python ends with
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        code = serve(slot, os.environ)
    except Exception:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _stop(*_: object) -> None:
    raise SystemExit(0)


def _end(pids: list[int]) -> None:
    def kill(*_: object) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    for pid in pids:
        os.kill(pid, signal.SIGCONT)
        os.kill(pid, signal.SIGTERM)
    signal.signal(signal.SIGALRM, kill)
    signal.alarm(_DRAIN_S)
    while pids:
        pids.remove(os.wait()[0])
    signal.alarm(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
