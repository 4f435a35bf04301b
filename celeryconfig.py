"""How jobs travel: server, bytes, queues, acknowledgement. Celery's own setting names throughout.

Producers, workers and Flower all read this file, so that they agree on every key in Redis. What it
needs of the user comes from EMBEDQ_* variables, or from the [wire] table of the settings file:

    redis_url             server; else REDIS_URL, else the embedded server of this user, else localhost.
                          redis://, rediss:// (TLS; its ssl_* queries say how) or sentinel://…;sentinel://… (without TLS)
    sentinel_master       name under which the Sentinels know the server
    sentinel_password     of the Sentinels themselves; the server's own stands in the URL
    max_texts_per_job     texts (or passages) of one call
    max_bytes_per_job     bytes of all texts of one call, as UTF-8
    result_expires_s      seconds a result is kept for its producer
    lease_s               seconds after which a silent worker's jobs go to another worker
    max_attempts          workers that may die of a job before it becomes a dead letter
    max_dead_letters      dead letters kept; the oldest go first
    data_dir              where the embedded server keeps its files
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit, urlunsplit

from kombu.serialization import register

from embedq.core.codec import pack, unpack
from embedq.core.errors import InvalidSettings

#: Names, defaults and types of the [wire] settings; a variable's text is turned into the same type.
WIRE: dict[str, Any] = {
    "redis_url": "",
    "sentinel_master": "",
    "sentinel_password": "",
    # A job is the unit of retry and of fairness: 10,000 texts are some seconds on an accelerator and
    # minutes on a CPU. Bulk loads are many such jobs.
    "max_texts_per_job": 10_000,
    # The broker holds a message three times over (base64, and again while in flight).
    "max_bytes_per_job": 16 * 1024 * 1024,
    "result_expires_s": 3600,
    "lease_s": 60,
    # A job that was held by so many workers as they died is not tried again.
    "max_attempts": 3,
    # Each is kept whole, so that it can be sent again: bounds what they take of the server's memory.
    "max_dead_letters": 1000,
    "data_dir": "",
}


def _read_wire() -> dict[str, Any]:
    """Environment over file over defaults. InvalidSettings names what is wrong and what is known."""
    file = Path(os.environ.get("EMBEDQ_CONFIG") or "embedq.toml")
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8")).get("wire", {}) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise InvalidSettings(f"{file} cannot be read as TOML: {error}") from None
    unknown = set(table) - set(WIRE)
    if unknown:
        raise InvalidSettings(f"{file} has unknown [wire] settings {sorted(unknown)}; known are {list(WIRE)}")
    return {name: _value(name, table.get(name, default), default) for name, default in WIRE.items()}


def _value(name: str, given: Any, default: Any) -> Any:
    given = os.environ.get(f"EMBEDQ_{name.upper()}", given)
    if isinstance(default, str):
        return str(given)
    try:
        number = int(given)
    except ValueError:
        number = 0
    if number < 1:
        raise InvalidSettings(f"EMBEDQ_{name.upper()} must be a whole number from 1; given {given!r:.40}")
    return number


def data_dir() -> Path:
    """The embedded server's directory, by default below the user's own data directory."""
    home = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(wire["data_dir"] or f"{home}/embedq").expanduser()


def url_file() -> Path:
    """Where a running embedded server leaves its URL, readable by its owner only."""
    return data_dir() / "url"


def redis_url() -> str:
    """The server everything talks to; read again at each call, since an embedded one comes and goes."""
    named = str(wire["redis_url"]) or os.environ.get("REDIS_URL")
    if named:
        return _with_tls_said(named)
    try:
        return url_file().read_text(encoding="utf-8").strip()
    except OSError:
        return "redis://127.0.0.1:6379/0"


def tls_options(url: str) -> dict[str, Any] | None:
    """TLS of a `rediss://` URL as its ssl_* queries say it, None for other URLs. InvalidSettings if they are wrong.

    The server's certificate and its host name are verified unless the URL says otherwise.
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
    """The URL with its verification written out: kombu verifies nothing where a URL does not ask for it."""
    options = tls_options(url)
    if options is None:
        return url
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query)) | {"ssl_cert_reqs": options["ssl_cert_reqs"]}
    return urlunsplit(parts._replace(query=urlencode(query, quote_via=quote, safe="/")))


def _sentinel_options(url: str) -> dict[str, Any]:
    """What the libraries below us must know to ask Sentinels where the server is."""
    if not url.startswith("sentinel://"):
        return {}
    if "ssl_" in url or any(not part.startswith("sentinel://") for part in url.split(";")):
        # The libraries below would take it for the queues and leave it out for results, or the other way round.
        raise InvalidSettings(
            "Sentinels are asked, and their server is reached, without TLS; EMBEDQ_REDIS_URL asks for both. Take one "
            "rediss:// URL, or Sentinels in a network of their own"
        )
    if not wire["sentinel_master"]:
        raise InvalidSettings(
            "a sentinel:// URL needs EMBEDQ_SENTINEL_MASTER, the name under which they know the server"
        )
    # Of a Sentinel whose machine is gone, the next one is asked soon.
    asking = {"socket_timeout": 2, "socket_connect_timeout": 2, "retry": None}
    asking["password"] = wire["sentinel_password"] or None
    return {"master_name": wire["sentinel_master"], "sentinel_kwargs": asking}


def queue_name(kind: str, model: str | None = None) -> str:
    """The queue of a kind of job ("embed", "rerank"), for the default model or a named one."""
    return f"{kind}.{model}" if model else kind


def route(
    name: str, args: Any, kwargs: dict[str, Any], options: Any, task: Any = None, **_: Any
) -> dict[str, str] | None:
    """Send each job to the queue of the model it names, also when it was sent by name."""
    kind = name.removeprefix("tasks.")
    if kind not in ("embed", "rerank"):
        return None
    return {"queue": queue_name(kind, (kwargs or {}).get("model"))}


wire = _read_wire()

# A name of our own, not kombu's "msgpack": an application that uses that one must not find its
# decoder replaced by importing us. The bytes are msgpack all the same.
register("embedq", pack, unpack, content_type="application/x-embedq-msgpack", content_encoding="binary")

broker_url = redis_url()
broker_use_ssl = tls_options(broker_url) or False  # the URL says it too; Flower reads it here
result_backend = redis_url()
# Ours, behind the plain URL: nothing is subscribed until somebody waits. Workers put theirs over it.
override_backends = {
    "redis": "embedq.tasks.result_backend:ResultBackend",
    "rediss": "embedq.tasks.result_backend:ResultBackend",
    "sentinel": "embedq.tasks.result_backend:SentinelResultBackend",
}

# What a message may be. No pickle: a worker must not run what a message says. "msgpack" and "json"
# let producers send by name without our code.
task_serializer = "embedq"
result_serializer = "embedq"
accept_content = ["embedq", "msgpack", "json"]
result_accept_content = ["embedq", "msgpack"]

# Acknowledged after the result is stored, so a worker that dies loses nothing.
task_acks_late = True
task_acks_on_failure = True  # an error is an answer; giving the job back would repeat it for ever
task_acks_on_timeout = True
worker_deduplicate_successful_tasks = True  # a job delivered twice is computed once if the first was stored
worker_cancel_long_running_tasks_on_connection_loss = False  # needs a pool that can stop a running job
worker_enable_prefetch_count_reduction = False  # would run small batches for a while after a reconnect
worker_prefetch_multiplier = 1  # the worker's job threads are the window; more would hide the backlog

task_routes = (route,)
task_default_queue = "embed"
task_create_missing_queues = True
task_track_started = False  # would cost three round trips per job; events tell the same
task_send_sent_event = False
worker_send_task_events = True  # Flower
event_serializer = "json"
result_expires = wire["result_expires_s"]

# How often a job is sent again when the server cannot be reached. Sentinels take seconds to name another server,
# and a web application must not fail all its requests meanwhile: behind them a send goes on for some 17 s.
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
    # With the throttle below, look for expired leases this often: a dead worker's jobs are running
    # elsewhere within one lease and a half.
    "unacked_restore_interval": min(2, wire["lease_s"] / 4),
    "unacked_restore_throttle": 1,
    # Only workers give back: whoever asks them something (Flower, `inspect`) looks for old jobs too, stock,
    # and by its own clock; one that is fast by a lease would take jobs from workers that live.
    "unacked_restore_limit": 0,
    "unacked_mutex_expire": 15,  # a stock worker that dies while looking must not stop the others for minutes
    "max_attempts": wire["max_attempts"],
    # Texts as msgpack in base64 in JSON: a third more than their bytes, and the envelope.
    "max_message_bytes": 2 * wire["max_bytes_per_job"] + 64 * 1024,
    "max_dead_letters": wire["max_dead_letters"],
    "health_check_interval": 10,
    "socket_timeout": 15,  # without it a publish on a dead connection can hang for ever
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "max_connections": 2048,  # the default of 10 per channel is below the number of job threads
    "queue_order_strategy": "priority",
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
