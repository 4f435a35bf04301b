"""Formats log lines: a short sentence, then the fields given as `extra`, which stay stable and can be filtered."""

from __future__ import annotations

import logging
import os
import re
from urllib.parse import urlsplit, urlunsplit

from embedq.core.errors import InvalidSettings

#: Levels of Python's logging.
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

#: What every record has; anything else on it came in through `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "data"}

#: The password of a TLS key file, in the query of a server's URL.
_KEY_PASSWORD = re.compile(r"(ssl_password=)[^&;]*")


class FieldFormatter(logging.Formatter):
    """`12:00:01 INFO embedq.workers.worker: ready action=worker_ready device=cpu`"""

    def format(self, record: logging.LogRecord) -> str:
        """The line: the sentence, its fields, then any traceback."""
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        text = " ".join(f"{name}={value}" for name, value in fields.items())
        message, arguments = record.msg, record.args
        if text:
            record.msg, record.args = f"{record.getMessage()} {text}", ()
        try:
            return super().format(record)
        finally:
            record.msg, record.args = message, arguments  # other handlers format the same record


def set_up(level: str = "INFO") -> None:
    """Log to standard error: our own loggers from `level`, everything else from WARNING. InvalidSettings for no level."""
    level = level.upper()
    if level not in LEVELS:
        raise InvalidSettings(f"EMBEDQ_LOG_LEVEL must be one of {', '.join(LEVELS)}; given {level!r:.40}")
    handler = logging.StreamHandler()
    handler.setFormatter(FieldFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    for name in ("embedq", "__main__"):
        logging.getLogger(name).setLevel(level)


def quiet_libraries() -> None:
    """Let transformers log errors alone unless TRANSFORMERS_VERBOSITY asks for more. Call before it is imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 worker", "2,000 workers"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def without_password(url: str) -> str:
    """A server's URL, or several of Sentinels, without passwords, for logs and errors."""
    if url.startswith("sentinel://"):
        return ";".join(map(_without_password, url.split(";")))
    return _without_password(url)


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    if parts.password is not None:
        host = parts.netloc.rpartition("@")[2]
        url = urlunsplit(parts._replace(netloc=f"***@{host}"))
    return _KEY_PASSWORD.sub(r"\1***", url)
