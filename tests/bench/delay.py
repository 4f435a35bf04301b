"""A TCP proxy that delays all it passes on, in both directions, without making it slower.

`python -m tests.bench.delay PORT MILLISECONDS` listens on a port of its own choice, which it prints, and
connects each caller to PORT on loopback. Bytes leave as long after they came; as many as may be are on the way.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from tests.running import Running

#: Bytes read in one go.
_CHUNK_BYTES = 256 * 1024


class Way:
    """One direction of a connection: what was read from `source` and is not yet written to `target`."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        #: (when it is to leave, bytes), the first to leave at the front. No bytes for the end.
        self.waiting: deque[tuple[float, bytes]] = deque()
        self.is_over = False

    def read(self, delay_s: float) -> None:
        """Take what came."""
        try:
            came = self.source.recv(_CHUNK_BYTES)
        except OSError:
            came = b""
        self.waiting.append((time.monotonic() + delay_s, came))
        self.is_over = not came

    def write(self, now_s: float) -> bool:
        """Pass on what is due; returns whether the direction has ended."""
        while self.waiting and self.waiting[0][0] <= now_s:
            _, leaving = self.waiting.popleft()
            try:
                if not leaving:
                    self.target.shutdown(socket.SHUT_WR)
                    return True
                self.target.sendall(leaving)
            except OSError:
                return True
        return False


def serve(listener: socket.socket, port: int, delay_s: float) -> None:
    """Pass on until the process is ended."""
    ways: dict[socket.socket, Way] = {}
    while True:
        now_s = time.monotonic()
        due_s = [way.waiting[0][0] for way in ways.values() if way.waiting]
        pause_s = max(0.0, min(due_s) - now_s) if due_s else None
        # `select` waits to the microsecond; `epoll` would round a millisecond up to two.
        readable, _, _ = select.select(
            [listener, *(one for one, way in ways.items() if not way.is_over)], [], [], pause_s
        )
        for source in readable:
            if source is listener:
                _accept(listener, port, ways)
            else:
                ways[source].read(delay_s)
        now_s = time.monotonic()
        for source, way in list(ways.items()):
            if way.write(now_s):
                del ways[source]


def _accept(listener: socket.socket, port: int, ways: dict[socket.socket, Way]) -> None:
    caller, _ = listener.accept()
    server = socket.create_connection(("127.0.0.1", port))
    for one, other in ((caller, server), (server, caller)):
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ways[one] = Way(one, other)


@contextmanager
def delaying(port: int, milliseconds: float) -> Iterator[int]:
    """A proxy before `port`, in a process of its own; yields the port on which it listens."""
    command = [sys.executable, "-m", "tests.bench.delay", str(port), str(milliseconds)]
    with Running(command) as running:
        yield int(running.wait_for("port=")[0].partition("port=")[2])


def main(arguments: list[str]) -> None:
    """Say where it listens, then serve."""
    port, milliseconds = arguments
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"delaying on port={listener.getsockname()[1]}", flush=True)
        serve(listener, int(port), float(milliseconds) / 1000)


if __name__ == "__main__":
    main(sys.argv[1:])
