"""A TCP proxy whose connections can be frozen: they stay open, and nothing comes through any more."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading


class Proxy:
    """Passes bytes between a port of its own and `port`, on one thread. A context manager."""

    def __init__(self, port: int) -> None:
        self._to = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        #: Each end of a connection, and the other one.
        self._other: dict[socket.socket, socket.socket] = {}
        self._frozen: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._is_open = True
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._is_open = False
        self._wake.send(b".")
        self._thread.join()
        for end in [*self._other, self._listener, self._wake, self._woken]:
            end.close()
        self._selector.close()

    def freeze(self) -> int:
        """Let nothing more through on the connections there are, new ones work; returns how many."""
        with self._lock:
            ends = [end for end in self._other if end not in self._frozen]
            for end in ends:
                self._frozen.add(end)
                self._selector.unregister(end)
        return len(ends) // 2

    def thaw(self) -> None:
        """Pass on what has waited."""
        with self._lock:
            for end in self._frozen:
                self._selector.register(end, selectors.EVENT_READ)
            self._frozen.clear()
        self._wake.send(b".")

    def _run(self) -> None:
        while self._is_open:
            for key, _ in self._selector.select():
                with self._lock:
                    self._serve(key.fileobj)

    def _serve(self, end: object) -> None:
        if end is self._woken:
            self._woken.recv(4096)
        elif end is self._listener:
            self._accept()
        elif end in self._other and end not in self._frozen:
            self._pass_on(end)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(self._to)
        except OSError:  # the server is being started again
            near.close()
            return
        for end, other in ((near, far), (far, near)):
            end.settimeout(10.0)
            self._other[end] = other
            self._selector.register(end, selectors.EVENT_READ)

    def _pass_on(self, end: socket.socket) -> None:
        try:
            data = end.recv(1 << 16)
            if data:
                self._other[end].sendall(data)
                return
        except OSError:
            pass
        self._close(end)

    def _close(self, end: socket.socket) -> None:
        for one in (end, self._other[end]):
            with contextlib.suppress(KeyError):
                self._selector.unregister(one)
            self._other.pop(one, None)
            self._frozen.discard(one)
            one.close()
