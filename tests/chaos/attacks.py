"""What is done to workers, connections and the server while jobs run; each at moments drawn from a seed.

Notes what each worker held as it was lost, so that the time to its redelivery can be told afterwards.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis

from tests.chaos.fleet import LEASE_S, Fleet, held_by
from tests.chaos.notes import Done
from tests.chaos.proxy import Proxy
from tests.own_server import OwnServer

#: Longest pause before the next worker is killed, in seconds; the shortest is none.
_MAX_PAUSE_S = 0.4

#: Of the kills, the share that is stopped first, for up to one and a half leases.
_STOPPED_FIRST = 0.2

#: Workers that must serve for one to be killed: those that are left have room for its jobs.
_MIN_SERVING = 3

#: Workers stopped at a time: with more, those that must serve would never be.
_MAX_STOPPED = 2

#: Seconds within which jobs of a lost worker must be elsewhere: one and a half leases, and the time
#: between two looks for leases that have run out.
REDELIVERY_S = 1.5 * LEASE_S + LEASE_S / 4

#: Longest wait for anything else.
_PATIENCE_S = 20.0

#: What a worker notes within this time of being lost, it did before.
_LAST_MOMENT_S = 0.5

#: Longest that a worker may take to find out that its connections are dead. It meets them one after
#: another, to send events, acknowledgements and questions, and each takes the socket's timeout of 15 s.
#: Its jobs are elsewhere long before.
RECOVERY_S = 60.0


@dataclass
class Loss:
    """A worker that answers no more, and what it held."""

    pid: int
    worker: str
    when_s: float
    #: By tag, when the job was taken.
    held: dict[str, float]


class Attacks:
    """All kinds of attack on one fleet and its server."""

    def __init__(self, fleet: Fleet, server: OwnServer, proxy: Proxy, seed: int) -> None:
        self._fleet, self._server, self._proxy = fleet, server, proxy
        self._random = random.Random(seed)
        self.losses: list[Loss] = []
        self.num_killed = self.num_stopped_first = self.num_hung = 0
        self.num_server_kills = self.num_cuts = self.num_cut = self.num_freezes = 0
        #: Seconds until a hung worker's jobs had all left it.
        self.hung_s: list[float] = []
        #: Seconds until a worker whose connections stay frozen took jobs on new ones.
        self.recovered_s: list[float] = []
        #: Stopped workers by process id, and when each is to be killed.
        self._stopped: dict[int, float] = {}

    def kill_workers(self, count: int, on_kill: Callable[[], None]) -> None:
        """`kill -9`, some of them stopped first."""
        for _ in range(count):
            time.sleep(self._random.uniform(0, _MAX_PAUSE_S))  # any moment may be the one
            self._kill_stopped(time.monotonic())
            pid = self._random.choice(self._fleet.wait_until_serving(_MIN_SERVING))
            if self._random.random() < _STOPPED_FIRST and len(self._stopped) < _MAX_STOPPED:
                self._lose(pid, signal.SIGSTOP)
                self._stopped[pid] = time.monotonic() + self._random.uniform(0, REDELIVERY_S)
                self.num_stopped_first += 1
            else:
                self._lose(pid, signal.SIGKILL)
            self.num_killed += 1
            on_kill()
        self._kill_stopped(float("inf"))

    def hang(self, count: int) -> None:
        """SIGSTOP, until the jobs are elsewhere; then SIGCONT, and the worker goes on where it was."""
        for _ in range(count):
            pid = self._random.choice(self._fleet.wait_until_serving(2))
            loss = self._lose(pid, signal.SIGSTOP)
            with self._client() as client:
                _wait_until(lambda loss=loss, client=client: not held_by(client, loss.worker))  # type: ignore[misc]
            self.hung_s.append(time.time() - loss.when_s)
            self._fleet.send_signal(pid, signal.SIGCONT)
            self._fleet.serving[pid] = loss.worker
            self.num_hung += 1

    def kill_server(self, count: int) -> None:
        """`kill -9`, and started again with what its append-only file holds; now and then a worker dies meanwhile."""
        for number in range(count):
            time.sleep(self._random.uniform(0.2, 1.5))
            self._server.kill()
            if number % 4 == 3 and len(self._fleet.look()) > 2:
                self._fleet.send_signal(self._random.choice(sorted(self._fleet.serving)), signal.SIGKILL)
                self.num_killed += 1
            time.sleep(self._random.uniform(0, 0.5))
            self._server.start()
            self.num_server_kills += 1

    def cut_connections(self, count: int) -> None:
        """Have the server close connections: those of one kind, or a single one."""
        for _ in range(count):
            time.sleep(self._random.uniform(0.1, 0.6))
            with self._client() as client:
                kind = self._random.choice(["normal", "pubsub", "one"])
                if kind == "one":
                    found = [one["id"] for one in client.client_list()]
                    self.num_cut += client.client_kill_filter(_id=self._random.choice(found), skipme=True)
                else:
                    self.num_cut += client.client_kill_filter(_type=kind, skipme=True)
                self.num_cuts += 1

    def freeze(self, count: int) -> None:
        """Freeze the connections of the worker behind the proxy for some leases; others do its jobs."""
        for _ in range(count):
            time.sleep(self._random.uniform(0.2, 1.0))
            self.num_freezes += self._proxy.freeze() > 0
            time.sleep(self._random.uniform(0.5, 2) * REDELIVERY_S)
            self._proxy.thaw()

    def freeze_for_good(self, count: int) -> None:
        """The same, but what was frozen stays so: the worker must find out, and make new connections."""
        for _ in range(count):
            (worker,) = _wait_until(lambda: [name for name in self._fleet.look().values() if "slot0@" in name])
            self._proxy.freeze()
            when_s = time.time()
            with self._client() as client:

                def taken_since(
                    client: redis.Redis = client, when_s: float = when_s, worker: str = worker
                ) -> list[float]:
                    # A question that was on its way is answered within that second.
                    return [taken_s for taken_s in held_by(client, worker).values() if taken_s > when_s + 1]

                self.recovered_s.append(min(_wait_until(taken_since, 2 * RECOVERY_S)) - when_s)

    def _lose(self, pid: int, number: signal.Signals) -> Loss:
        worker = self._fleet.serving[pid]
        self._fleet.send_signal(pid, number)
        when_s = time.time()
        with self._client() as client:
            loss = Loss(pid, worker, when_s, held_by(client, worker))
        self.losses.append(loss)
        return loss

    def _kill_stopped(self, now_s: float) -> None:
        for pid in [pid for pid, due_s in self._stopped.items() if due_s <= now_s]:
            del self._stopped[pid]
            self._fleet.send_signal(pid, signal.SIGKILL)

    def _client(self) -> redis.Redis:
        return redis.Redis.from_url(self._server.url)


def redelivery_s(losses: list[Loss], done: Done) -> tuple[list[float], int]:
    """Seconds from the loss of a worker until each of its jobs was taken again; and how many never were.

    Those it had acknowledged in its last moment, after we had asked what it held; or they are lost,
    which the results tell.
    """
    later: dict[str, list[tuple[float, int]]] = {tag: list(found) for tag, found in done.deliveries.items()}
    for loss in losses:  # a worker that was lost before it could note what it took
        for tag, taken_s in loss.held.items():
            later.setdefault(tag, []).append((taken_s, loss.pid))
    seconds, num_settled = [], 0
    for loss in losses:
        for tag in loss.held:
            # Also to the same worker, once it has come back and taken the job again.
            after = [
                when_s
                for when_s, pid in later[tag]
                if when_s > loss.when_s + (_LAST_MOMENT_S if pid == loss.pid else 0)
            ]
            if after:
                seconds.append(min(after) - loss.when_s)
            else:
                num_settled += 1
    return sorted(seconds), num_settled


def _wait_until(condition: Callable[[], Any], patience_s: float = _PATIENCE_S) -> Any:
    deadline_s = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"not within {patience_s} s"
        time.sleep(0.01)
    return found
