"""embedq's own Celery application: the settings of `celeryconfig.py`, apart from any application of yours."""

from __future__ import annotations

from celery import Celery

from embedq import celeryconfig as config

__all__ = ["app", "config", "key_prefix"]

# Not the current app: `shared_task`s of the application must stay with the application's own.
app = Celery("embedq", set_as_current=False)
# Without `wire`, which may hold the server's password: workers show Flower all they are configured with.
app.config_from_object({name: value for name, value in vars(config).items() if name != "wire"})


def key_prefix(of: Celery) -> str:
    """What an application writes before every key of its jobs: kombu's `global_keyprefix`, by default nothing."""
    return str(of.conf.broker_transport_options.get("global_keyprefix") or "")
