"""A server with a replica and Sentinels that make it master when the first is gone: all of it real, on loopback."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import redis

from embedq.workers.embedded import _free_port, find_program
from tests.running import Running

#: The name under which the Sentinels know the server.
MASTER = "main"

#: Milliseconds of silence after which a Sentinel calls the master down, and a failover's own limit.
_DOWN_AFTER_MS, _FAILOVER_MS = 1000, 5000

#: Seconds for a replica to be in step, or a failover to be done, on a busy machine.
_TIMEOUT_S = 60

#: Of the servers, which every client needs; and of the Sentinels.
PASSWORD, SENTINEL_PASSWORD = "the servers'", "the Sentinels'"


class Failover:
    """Two servers and three Sentinels, two of which must agree; a context manager."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running = ExitStack()
        self._servers: dict[int, Running] = {}
        self._sentinels: list[int] = []

    def __enter__(self) -> Failover:
        first = self._start_server()
        self._start_server("--replicaof", f"127.0.0.1 {first}", "--primaryauth", PASSWORD)
        self._sentinels = [self._start_sentinel(first) for _ in range(3)]
        self._until(lambda: all(self._knows_all(port) for port in self._sentinels))
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    @property
    def environment(self) -> dict[str, str]:
        """How a worker or a producer finds the server."""
        first, *rest = (f"127.0.0.1:{port}/0" for port in self._sentinels)
        urls = [f"sentinel://:{PASSWORD.replace(' ', '%20')}@{first}", *(f"sentinel://{one}" for one in rest)]
        return {
            "EMBEDQ_REDIS_URL": ";".join(urls),
            "EMBEDQ_SENTINEL_MASTER": MASTER,
            "EMBEDQ_SENTINEL_PASSWORD": SENTINEL_PASSWORD,
        }

    def master(self) -> int:
        """The port of the server that the Sentinels call master."""
        with self._sentinel(self._sentinels[0]) as client:
            return int(client.sentinel_get_master_addr_by_name(MASTER)[1])

    def client(self, port: int | None = None) -> redis.Redis:
        """A client of the master, or of the server at `port`."""
        return redis.Redis(port=port or self.master(), password=PASSWORD)

    def kill_master(self) -> int:
        """Kill it once its replica has all it has; returns its port. The Sentinels name another after some seconds."""
        dead = self.master()
        with self.client(dead) as client:
            assert client.wait(1, 1000 * _TIMEOUT_S) == 1
        self._servers[dead].process.kill()
        return dead

    def start_again(self, port: int) -> None:
        """Start a killed server where it was, when another is in its place; the Sentinels make it a replica."""
        self._until(lambda: self.master() != port)
        self._start_server("--primaryauth", PASSWORD, port=port)
        self._until(lambda: self.client(port).info("replication")["role"] == "slave")

    def _start_server(self, *options: str, port: int = 0) -> int:
        port = port or _free_port()
        fixed = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--requirepass", PASSWORD]
        directory = self._directory / str(port)
        directory.mkdir(exist_ok=True)
        running = self._running.enter_context(Running([find_program(), *fixed, "--dir", str(directory), *options]))
        running.wait_for("Ready to accept connections")
        self._servers[port] = running
        return port

    def _start_sentinel(self, master: int) -> int:
        port = _free_port()
        file = self._directory / f"sentinel-{port}.conf"
        file.write_text(
            f'port {port}\nbind 127.0.0.1\nrequirepass "{SENTINEL_PASSWORD}"\n'
            f'sentinel sentinel-pass "{SENTINEL_PASSWORD}"\n'
            f"sentinel monitor {MASTER} 127.0.0.1 {master} 2\n"
            f'sentinel auth-pass {MASTER} "{PASSWORD}"\n'
            f"sentinel down-after-milliseconds {MASTER} {_DOWN_AFTER_MS}\n"
            f"sentinel failover-timeout {MASTER} {_FAILOVER_MS}\n"
        )
        running = self._running.enter_context(Running([find_program(), str(file), "--sentinel"]))
        running.wait_for("+monitor")
        return port

    def _sentinel(self, port: int) -> redis.Redis:
        return redis.Redis(port=port, password=SENTINEL_PASSWORD, decode_responses=True)

    def _knows_all(self, port: int) -> bool:
        with self._sentinel(port) as client:
            state = client.sentinel_master(MASTER)
            return state["num-slaves"] == 1 and state["num-other-sentinels"] == 2

    def _until(self, holds: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not holds():
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
