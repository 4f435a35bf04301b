"""A server that speaks TLS: Valkey as it is installed, which may have none built in, behind a proxy that has.

Certificates come from an authority that the test makes. The proxy only passes bytes on.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import trustme

Waited = TypeVar("Waited")

#: Bytes passed on at a time.
_CHUNK_BYTES = 64 * 1024


class Authority:
    """A certificate authority, and its certificate in a file."""

    def __init__(self, directory: Path) -> None:
        self.ca = trustme.CA()
        self.file = directory / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.file))

    def client_files(self, directory: Path) -> tuple[Path, Path]:
        """A client's certificate and its key."""
        leaf = self.ca.issue_cert("worker@embedq")
        certificate, key = directory / "client.pem", directory / "client.key"
        leaf.cert_chain_pems[0].write_to_path(str(certificate))
        leaf.private_key_pem.write_to_path(str(key))
        return certificate, key


class TlsProxy:
    """Takes TLS on a free port of loopback and passes it on to `port`, in a thread of its own; a context manager.

    Its certificate is for `host`, from `authority`. With `asks_clients` it wants a certificate of theirs.
    """

    def __init__(self, port: int, authority: Authority, host: str = "localhost", asks_clients: bool = False) -> None:
        self._target_port = port
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.ca.issue_cert(host).configure_cert(self._context)
        if asks_clients:
            authority.ca.configure_trust(self._context)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        #: Connections whose handshake succeeded.
        self.num_connections = 0

    def __enter__(self) -> TlsProxy:
        self._thread.start()
        self._server = self._wait(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context))
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def url(self, authority: Authority, password: str = "", host: str = "localhost", **options: str) -> str:
        """What to reach it by for whoever trusts `authority`."""
        queries = {"ssl_ca_certs": str(authority.file)} | options
        query = "&".join(f"{name}={quote(value, safe='/')}" for name, value in queries.items())
        return f"rediss://:{password}@{host}:{self.port}/0?{query}"

    def _wait(self, coroutine: Coroutine[Any, Any, Waited]) -> Waited:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    async def _close(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with suppress(OSError, asyncio.CancelledError):
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
            parts = [
                asyncio.ensure_future(_pass_on(reader, inner_writer)),
                asyncio.ensure_future(_pass_on(inner_reader, writer)),
            ]
            try:
                await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for part in parts:
                    part.cancel()
                for end in (writer, inner_writer):
                    end.close()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while chunk := await reader.read(_CHUNK_BYTES):
            writer.write(chunk)
            await writer.drain()
