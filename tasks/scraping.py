"""A small HTTP server for monitoring: `/metrics` for Prometheus, and pages of health that only have a status.

It has threads of its own, so that it answers whatever the rest of the process does. Knows no metric.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from embedq.core.errors import InvalidSettings

#: Seconds after which a client that sends nothing is disconnected: each has a thread here.
_CLIENT_TIMEOUT_S = 10.0

#: A page: returns whether all is well, and why or why not.
Page = Callable[[], tuple[bool, str]]


class Scraping:
    """The server; a context manager that stops it."""

    def __init__(self, host: str, port: int, registry: CollectorRegistry, pages: Mapping[str, Page]) -> None:
        """InvalidSettings if the port is not free; 0 chooses a free one. `pages` are by path."""
        self._metrics = make_wsgi_app(registry)
        self._pages = dict(pages)
        try:
            self._server = make_server(host, port, self._answer, _server_class(host), _Quiet)
        except OSError as error:
            raise InvalidSettings(f"metrics cannot be served at {host} port {port}: {error}") from None
        #: The port that was taken.
        self.port = int(self._server.server_port)
        threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True).start()

    def __enter__(self) -> Scraping:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            answer: Iterable[bytes] = self._metrics(environ, start_response)
            return answer
        if path in self._pages:
            is_well, reason = self._pages[path]()
            status = "200 OK" if is_well else "503 Service Unavailable"
        else:
            status, reason = "404 Not Found", "the pages are " + ", ".join(["/metrics", *self._pages])
        start_response(status, [("Content-Type", "text/plain; charset=utf-8"), ("Cache-Control", "no-store")])
        return [f"{reason}\n".encode()]


class _Quiet(WSGIRequestHandler):
    """Does not log requests: a line per scrape would bury the others."""

    timeout = _CLIENT_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        """Do nothing."""


def _server_class(host: str) -> type[WSGIServer]:
    """The server's class: for IPv6 if the address is one, else for IPv4."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return type("Server", (ThreadingWSGIServer,), {"address_family": family})
