"""Celery's configuration: server, serializer, queues and acknowledgement, under Celery's own setting names.

Producers, workers and Flower all read this file, so that they agree on every key in Redis. Users set these values by
EMBEDQ_* variables or in the [wire] table of the settings file:

    redis_url             URL of the server; else REDIS_URL, else this user's embedded server, else localhost.
                          redis://, rediss:// (TLS, configured by ssl_* queries) or sentinel://…;sentinel://… (no TLS).
                          Celery's own variables (CELERY_BROKER_URL and so on) do not count
    sentinel_master       name of the server at the Sentinels
    sentinel_password     password of the Sentinels; the server's own is part of the URL
    max_texts_per_job     most texts (or passages) of one call
    max_bytes_per_job     most bytes of all texts of one call, as UTF-8
    max_queued_jobs       most jobs that wait in one queue, interactive and bulk each; more raise QueueFull. 0: no limit
    max_queued_bytes      most bytes of their messages, as the server estimates them. 0: no limit
    result_expires_s      seconds that a result is kept for its producer
    lease_s               seconds after which a silent worker's jobs are redelivered to another
    max_attempts          workers that may die while holding a job before it becomes a dead letter
    max_dead_letters      most dead letters kept; the oldest are dropped first
    data_dir              directory of the embedded server's files
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from kombu.serialization import register

from embedq.core.codec import pack, unpack
from embedq.core.errors import InvalidSettings
from embedq.core.setting_names import WORKER, hint, misspelt_variables, nearest, variable_of

#: Names, defaults and types of the [wire] settings; a variable's text is converted to the default's type.
WIRE: dict[str, Any] = {
    "redis_url": "",
    "sentinel_master": "",
    "sentinel_password": "",
    # A job is the unit of retry and fairness: 10,000 texts take seconds on an accelerator and minutes on a CPU. Split
    # bulk loads into many such jobs.
    "max_texts_per_job": 10_000,
    # The server stores a message three times over (base64, and again while in flight).
    "max_bytes_per_job": 16 * 1024 * 1024,
    # Of one class, interactive or bulk, in one queue; 0 for no limit but the server's memory.
    "max_queued_jobs": 0,
    "max_queued_bytes": 0,
    "result_expires_s": 3600,
    "lease_s": 60,
    # A job is not retried after this many workers died while holding it.
    "max_attempts": 3,
    # Each is stored whole, so that it can be sent again; the limit bounds their memory on the server.
    "max_dead_letters": 1000,
    "data_dir": "",
}

#: Largest values. The server takes no message above 512 MB, and one of ours has twice the bytes of its texts; it takes
#: no lifetime that overflows its clock; and a lease of more than a day would keep a dead worker's jobs for that long.
_MAXIMA = {"max_bytes_per_job": 256 * 1024 * 1024, "result_expires_s": 10 * 365 * 86_400, "lease_s": 86_400}

#: For all others; above any that makes sense, and within every wire format.
_MAX_VALUE = 2**31 - 1


#: Queues of parts of datasets are named `embed_parts.<model>`.
PARTS = "embed_parts"


def read_wire() -> dict[str, Any]:
    """Read the settings: environment, else file, else default. InvalidSettings names a wrong or misspelt one."""
    _refuse_misspelt_variables()
    table = _wire_table()
    return {name: _value(name, table.get(name, default), default) for name, default in WIRE.items()}


def _refuse_misspelt_variables() -> None:
    """InvalidSettings for a variable that was meant for one of these settings: the default would be used in its place.

    Others are not refused here: a worker's setting, known or not, keeps no producer from its work.
    """
    for variable, meant in misspelt_variables().items():
        if meant and meant in WIRE:
            raise InvalidSettings(f"{variable} is no setting of embedq; did you mean {variable_of(meant)}?")


def _wire_table() -> dict[str, Any]:
    """The file's table [wire]; empty if there is no file and EMBEDQ_CONFIG names none."""
    named = os.environ.get("EMBEDQ_CONFIG")
    file = Path(named or "embedq.toml")
    if named and not file.is_file():  # a misspelt name would mean the default server
        raise InvalidSettings(f"EMBEDQ_CONFIG is {named!r}, but there is no such file")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise InvalidSettings(f"{file} cannot be read as TOML: {error}") from None
    table = content.get("wire", {})
    if not isinstance(table, dict):  # without its value, which may be a URL with a password
        raise InvalidSettings(f"wire in {file} must be a table, [wire]; given {type(table).__name__}")
    for name in table.keys() - WIRE.keys():
        cure = "; it is a worker's and belongs at top level" if name in WORKER else hint(name, WIRE)
        raise InvalidSettings(f"{file} has an unknown [wire] setting {name!r:.60}{cure} (known are {', '.join(WIRE)})")
    _refuse_misplaced(file, content.keys() - {"wire", *WORKER})
    return table


def _refuse_misplaced(file: Path, unknown: Iterable[str]) -> None:
    """InvalidSettings for an unknown key at the file's top level that was meant for [wire]; others are a worker's."""
    for name in unknown:
        meant = nearest(name, (*WIRE, *WORKER, "wire"))
        if meant == "wire":
            raise InvalidSettings(f"{file} has an unknown table [{name:.60}]; did you mean [wire]?")
        if meant in WIRE:
            raise InvalidSettings(
                f"{file} has an unknown setting {name!r:.60}; did you mean {meant} in the table [wire]?"
            )


def _value(name: str, given: Any, default: Any) -> Any:
    variable = f"EMBEDQ_{name.upper()}"
    given = os.environ.get(variable, given)
    if isinstance(default, str):
        if not isinstance(given, str):
            raise InvalidSettings(f"{variable} must be a string; given {type(given).__name__}")
        return given
    try:
        number = int(given) if isinstance(given, str) or type(given) is int else -1
    except ValueError:
        number = -1
    most = _MAXIMA.get(name, _MAX_VALUE)
    least = min(1, default)  # 0 says "no limit" where that is the default
    if not least <= number <= most:
        limit = f" to {most:,}" if name in _MAXIMA or number > most else ""
        raise InvalidSettings(f"{variable} must be a whole number from {least}{limit}; given {given!r:.40}")
    return number


def data_dir() -> Path:
    """Directory of the embedded server, by default below the user's own data directory."""
    return _expanded(wire["data_dir"] or f"{os.environ.get('XDG_DATA_HOME') or '~/.local/share'}/embedq")


@lru_cache(maxsize=16)
def _expanded(directory: str) -> Path:
    return Path(directory).expanduser()  # takes longer than sending a job should


def url_file() -> Path:
    """File with the URL of the running embedded server, readable by its owner only."""
    return data_dir() / "url"


def redis_url() -> str:
    """URL of the server. Looked up at each call, because an embedded server may start or stop.

    InvalidSettings, without the URL, if the one that the user named has not the right form.
    """
    for variable, url in (("EMBEDQ_REDIS_URL", str(wire["redis_url"])), ("REDIS_URL", os.environ.get("REDIS_URL"))):
        if url:
            _check_url(variable, url)
            return _with_tls_said(url)
    return embedded_url() or "redis://127.0.0.1:6379/0"


def is_server_named() -> bool:
    """Returns True if the user named a server, so that an embedded one does not count."""
    return bool(wire["redis_url"] or os.environ.get("REDIS_URL"))


def embedded_url() -> str | None:
    """URL of this user's embedded server, as it published it; None if none runs.

    Takes some microseconds if the file has not changed: a producer looks several times for each job.
    """
    file = url_file()
    try:
        found = file.stat()
        return _read_url(file, found.st_ino, found.st_mtime_ns)
    except OSError:
        return None


@lru_cache(maxsize=4)
def _read_url(file: Path, *_: int) -> str | None:
    """Returns the URL in the file, None if it is empty. The cache's key holds the file's inode and time of change."""
    return file.read_text(encoding="utf-8").strip() or None


#: The form of a URL, for errors.
_FORM = (
    "redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], the same with rediss:// and ?ssl_…= for TLS, redis+socket:///PATH, or "
    "sentinel://HOST:PORT;sentinel://HOST:PORT"
)

#: Queries of TLS that are paths of files, and the others.
_SSL_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_SSL = ("ssl_ca_path", "ssl_ca_data", "ssl_password", "ssl_cert_reqs", "ssl_check_hostname", "ssl_ciphers")

#: Schemes, and the queries that a URL of each may have. Celery and kombu read others differently: one refuses at the first
#: job what the other takes.
_QUERIES: dict[str, tuple[str, ...]] = {
    "redis": (),
    "rediss": (*_SSL_FILES, *_SSL),
    "sentinel": (),
    "redis+socket": ("virtual_host",),
}


def _check_url(variable: str, url: str) -> None:
    """InvalidSettings if the server's URL has not the right form. No part of it is shown: any may hold its password."""
    is_sentinels = url.startswith("sentinel://")
    if is_sentinels:
        _refuse_tls_of_sentinels(url)
    for part in url.split(";") if is_sentinels else [url]:
        if problem := _url_problem(part):
            raise InvalidSettings(f"{variable} {problem}; a server is written {_FORM}")


def _url_problem(url: str) -> str | None:
    if url != "".join(url.split()):
        return "contains white space"
    parts = urlsplit(url)
    scheme = url.partition("://")[0]  # as it is written: kombu knows the schemes in lower case only
    if "://" not in url or scheme not in _QUERIES:
        return f"does not begin with {', '.join(f'{known}://' for known in _QUERIES)}"
    if "#" in url:
        return "contains a #; in a password it is written %23, and a / is written %2F"
    try:
        _ = parts.port
    except ValueError:
        return "has a port that is no number from 0 to 65535; in a password a / is written %2F, and a : is written %3A"
    if scheme == "redis+socket":
        if not parts.path.strip("/"):
            return "names no socket"
    elif not parts.hostname:
        return "names no host"
    elif (database := parts.path.removeprefix("/")) and not (database.isascii() and database.isdigit()):
        return "has a database that is no number; in a password a / is written %2F"
    return _query_problem(scheme, parts.query)


def _query_problem(scheme: str, query: str) -> str | None:
    known = _QUERIES[scheme]
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            return f"has a query that is not read; with {scheme}:// there may be {', '.join(known) or 'none'}"
        if name in _SSL_FILES and not Path(value).is_file():
            return f"names a file by {name} that is not there"
    return None


def tls_options(url: str) -> dict[str, Any] | None:
    """TLS options from a `rediss://` URL's ssl_* queries; None for other URLs. InvalidSettings for a wrong query.

    The server's certificate and host name are verified unless the URL turns that off.
    """
    parts = urlsplit(url)
    if parts.scheme != "rediss":
        return None
    options: dict[str, Any] = {name: value for name, value in parse_qsl(parts.query) if name.startswith("ssl_")}
    verified = options.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    if verified not in ("required", "optional", "none"):
        raise InvalidSettings(
            f"ssl_cert_reqs in EMBEDQ_REDIS_URL must be required, optional or none; given {verified!r:.40}"
        )
    if "ssl_check_hostname" in options:
        options["ssl_check_hostname"] = options["ssl_check_hostname"].lower() != "false"
    return options | {"ssl_cert_reqs": verified}


def _with_tls_said(url: str) -> str:
    """The URL with its verification spelled out, because kombu verifies nothing unless the URL asks for it."""
    options = tls_options(url)
    if options is None:
        return url
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query)) | {"ssl_cert_reqs": options["ssl_cert_reqs"]}
    return urlunsplit(parts._replace(query=urlencode(query, quote_via=quote, safe="/")))


def _sentinel_options(url: str) -> dict[str, Any]:
    """Options of Celery's transports for finding the server through Sentinels; empty for other URLs."""
    if not url.startswith("sentinel://"):
        return {}
    if not wire["sentinel_master"]:
        raise InvalidSettings("a sentinel:// URL needs EMBEDQ_SENTINEL_MASTER, the name of the server at the Sentinels")
    # Short timeouts: if a Sentinel's machine is gone, the next Sentinel is asked soon.
    asking = {"socket_timeout": 2, "socket_connect_timeout": 2, "retry": None}
    asking["password"] = wire["sentinel_password"] or None
    return {"master_name": wire["sentinel_master"], "sentinel_kwargs": asking}


def _refuse_tls_of_sentinels(url: str) -> None:
    """InvalidSettings: kombu and Celery would apply TLS to different connections, to queues or to results alone."""
    if "ssl_" in url or "rediss://" in url:
        raise InvalidSettings(
            "Sentinels and their server are reached without TLS, but EMBEDQ_REDIS_URL asks for both. Use one rediss:// "
            "URL, or Sentinels on a private network"
        )


def queue_name(kind: str, model: str | None = None) -> str:
    """Queue of a kind of job ("embed", "rerank"), for the default model or a named one."""
    return f"{kind}.{model}" if model else kind


def parts_queue(model: str) -> str:
    """The queue of a model's parts of datasets: apart from its texts, because a worker takes one or two at a time."""
    return f"{PARTS}.{model}"


def route(
    name: str, args: Any, kwargs: dict[str, Any], options: Any, task: Any = None, **_: Any
) -> dict[str, str] | None:
    """Route each job to the queue of the model it names, also if it was sent by task name."""
    kind = name.removeprefix("tasks.")
    if kind in ("embed_part", "rerank_part"):
        return {"queue": parts_queue((kwargs or {}).get("model", ""))}
    if kind not in ("embed", "rerank"):
        return None
    kwargs = kwargs or {}
    if isinstance(mapped := kwargs.get("task"), Mapping):  # a map of our task: its options are the mapped signature's
        kwargs = mapped.get("kwargs") or {}
    return {"queue": queue_name(kind, kwargs.get("model"))}


wire = read_wire()

# Our own name, not kombu's "msgpack": importing embedq must not replace the decoder of an application that uses that
# one. The bytes are msgpack all the same.
register("embedq", pack, unpack, content_type="application/x-embedq-msgpack", content_encoding="binary")

broker_url = redis_url()
broker_use_ssl = tls_options(broker_url) or False  # also part of the URL, but Flower reads it here
result_backend = broker_url  # not looked up again: an embedded server may have started meanwhile
# Our backend for the usual URLs: it subscribes to nothing until a caller waits. Workers replace it with their own.
override_backends = {
    "redis": "embedq.tasks.result_backend:ResultBackend",
    "rediss": "embedq.tasks.result_backend:ResultBackend",
    "sentinel": "embedq.tasks.result_backend:SentinelResultBackend",
}

# Accepted content types. No pickle: a message must not be able to run code. "msgpack" and "json" let producers send
# by task name without our code.
task_serializer = "embedq"
result_serializer = "embedq"
accept_content = ["embedq", "msgpack", "json"]
result_accept_content = ["embedq", "msgpack"]

# Acknowledged after the result is stored, so a worker that dies loses nothing.
task_acks_late = True
task_acks_on_failure = True  # an error is a result; redelivering the job would repeat it for ever
task_acks_on_timeout = True
worker_deduplicate_successful_tasks = True  # a redelivered job whose result is stored is not computed again
worker_cancel_long_running_tasks_on_connection_loss = False  # needs a pool that can stop a running job
worker_enable_prefetch_count_reduction = False  # would form small batches for a while after a reconnect
worker_prefetch_multiplier = 1  # prefetching more would hide the backlog; embedq's own workers prefetch by tokens

task_routes = (route,)
task_default_queue = "embed"
task_create_missing_queues = True
task_track_started = False  # would cost three round trips per job; events report the same
task_send_sent_event = False
worker_send_task_events = True  # Flower
event_serializer = "json"
result_expires = wire["result_expires_s"]

# Retries of a publish while the server cannot be reached. Sentinels need seconds to elect another server, and a web
# application must not fail all its requests meanwhile: with Sentinels a publish is retried for about 17 s.
task_publish_retry_policy = {
    "max_retries": 20 if broker_url.startswith("sentinel://") else 3,
    "interval_start": 0,
    "interval_step": 0.2,
    "interval_max": 1,
}

broker_connection_retry_on_startup = True
broker_connection_max_retries = None
broker_channel_error_retry = True
broker_pool_limit = 10
broker_connection_timeout = 4
broker_transport_options = {
    # A lease, renewed while the worker lives: see workers/broker/transport.py.
    "visibility_timeout": wire["lease_s"],
    # With the throttle below, how often to look for expired leases: a dead worker's jobs run elsewhere within one and a
    # half leases.
    "unacked_restore_interval": min(2, wire["lease_s"] / 4),
    "unacked_restore_throttle": 1,
    # Only workers restore expired jobs. Stock clients (Flower, `inspect`) would look for them too, by their own clocks:
    # one whose clock is a lease ahead would take jobs from live workers.
    "unacked_restore_limit": 0,
    "unacked_mutex_expire": 15,  # a stock worker that dies while it looks must not block the others for minutes
    "max_attempts": wire["max_attempts"],
    # Texts travel as msgpack in base64 in JSON: a third more than their bytes, plus the envelope.
    "max_message_bytes": 2 * wire["max_bytes_per_job"] + 64 * 1024,
    "max_dead_letters": wire["max_dead_letters"],
    "health_check_interval": 10,
    "socket_timeout": 15,  # without it a publish on a dead connection could hang for ever
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "max_connections": 2048,  # the default of 10 per channel is below the number of job threads
    "queue_order_strategy": "round_robin",  # of lists of one priority none starves another
    "priority_steps": [0, 3, 6, 9],
    "sep": ":",
    "client_name": "embedq",
    **_sentinel_options(broker_url),
}
result_backend_transport_options = {
    "retry_policy": {"timeout": 5.0},
    "visibility_timeout": wire["lease_s"],
    **_sentinel_options(broker_url),
}
visibility_timeout = wire["lease_s"]
redis_socket_timeout = 15
redis_socket_connect_timeout = 5
redis_socket_keepalive = True
redis_backend_health_check_interval = 25
result_backend_always_retry = True
result_backend_max_retries = 10

worker_hijack_root_logger = False
worker_redirect_stdouts = False
