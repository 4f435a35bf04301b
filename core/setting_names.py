"""The names of all settings, and the nearest right one of a misspelt name.

Names alone, without values: a producer knows a worker's settings by them, and has none of what it takes to read those.
`tests/test_setting_names.py` holds them against the settings themselves.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches

#: Of a worker, at top level in the settings file: the fields of `core.settings.Settings`.
WORKER = (
    "models",
    "default_embed",
    "default_rerank",
    "device",
    "max_batch_tokens",
    "max_batch_sequences",
    "max_waiting_tokens",
    "max_batch_s",
    "max_bulk_wait_s",
    "cpu_streams",
    "encode_threads",
    "hang_timeout_s",
    "load_timeout_s",
    "window_batches",
    "max_jobs",
    "drain_timeout_s",
    "metrics_port",
    "metrics_host",
    "data_roots",
    "traces",
    "replace_revision",
)

#: Of producers and workers, in the file's table [wire]: the names of `celeryconfig.WIRE`.
WIRE = (
    "redis_url",
    "sentinel_master",
    "sentinel_password",
    "max_texts_per_job",
    "max_bytes_per_job",
    "max_queued_jobs",
    "max_queued_bytes",
    "result_expires_s",
    "lease_s",
    "max_attempts",
    "max_dead_letters",
    "data_dir",
)

#: Of the environment alone.
ENVIRONMENT = ("config", "log_level", "device_label", "worker_name", "heartbeat_fd")

_PREFIX = "EMBEDQ_"

#: What Kubernetes and Docker set in every container for a service whose name begins with embedq; nobody can misspell it.
_OF_SERVICES = re.compile(
    r"EMBEDQ_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that looks most like this one; None if none does."""
    found = get_close_matches(name.lower(), list(known), n=1)
    return found[0] if found else None


def hint(name: str, known: Iterable[str], form: str = "{}") -> str:
    """The end of an error about a wrong name: the nearest right one, as `form` writes it, where there is one."""
    found = nearest(name, known)
    return f"; did you mean {form.format(found)}?" if found else ""


def misspelt_variables() -> dict[str, str | None]:
    """Each variable EMBEDQ_… of this process that nothing reads, and the setting that was probably meant."""
    return {
        name: nearest(name.removeprefix(_PREFIX), (*WIRE, *WORKER, *ENVIRONMENT))
        for name in sorted(os.environ)
        if name.startswith(_PREFIX) and not _is_read(name)
    }


def variable_of(setting: str) -> str:
    """The variable of a setting."""
    return f"{_PREFIX}{setting.upper()}"


def _is_read(variable: str) -> bool:
    name = variable.removeprefix(_PREFIX)
    return (name.isupper() and name.lower() in (*WIRE, *WORKER, *ENVIRONMENT)) or _OF_SERVICES.fullmatch(
        variable
    ) is not None
