"""The server and database behind a broker's URL, without its user and password, and the prefix of its keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    from celery import Celery

#: Schemes of URLs that lead to Redis or Valkey; the first word of `rediss+…` and of `redis+socket` counts as well.
_SCHEMES = ("redis", "rediss", "valkey", "valkeys", "sentinel")

_LOOPBACK = ("localhost", "127.0.0.1", "::1")

_PORTS = {"sentinel": 26379}


class Address(NamedTuple):
    """A Redis or Valkey database."""

    #: `host:port` of the server, of each Sentinel, or the path of a socket.
    hosts: frozenset[str]
    database: str

    def __str__(self) -> str:
        return f"{', '.join(sorted(self.hosts))}, database {self.database}"


def address_of(url: str | Iterable[str] | None) -> Address | None:
    """The database behind a broker's URL, or several as Celery takes them; None for brokers of another kind, and for a
    URL that cannot be read.

    Two addresses that differ may still be one database, known by two names.
    """
    parts = [part for one in ([url] if isinstance(url, str) else url or []) for part in one.split(";")]
    found = [address for part in parts if (address := _address(part))]
    if not found or len(found) < len(parts):
        return None
    return Address(frozenset().union(*(one.hosts for one in found)), found[0].database)


def _address(url: str) -> Address | None:
    try:
        parts = urlsplit(url.strip())
        scheme, port = parts.scheme.partition("+")[0], parts.port
    except ValueError:  # a port that is no number
        return None
    if scheme not in _SCHEMES:
        return None
    if not parts.hostname:  # a socket: its path is the server, and a query names the database
        database = parse_qs(parts.query).get("virtual_host", ["0"])[0]
        return Address(frozenset([unquote(parts.path)]), database.strip("/") or "0")
    host = "localhost" if parts.hostname in _LOOPBACK else parts.hostname
    return Address(frozenset([f"{host}:{port or _PORTS.get(scheme, 6379)}"]), parts.path.strip("/") or "0")


def key_prefix(app: Celery) -> str:
    """The prefix of every key of an application's jobs: kombu's `global_keyprefix`, by default empty."""
    return str(app.conf.broker_transport_options.get("global_keyprefix") or "")


def shown(url: str) -> str:
    """A broker's or result backend's URL of any kind, without its user, password and query."""
    return "; ".join(_shown(part) for part in url.split(";"))


def _shown(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "a URL that cannot be read"
    if not parts.netloc:
        return f"{parts.scheme}:" if parts.scheme else "a name without a scheme"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"
