"""embedq's own Celery application: the settings of `celeryconfig.py`, apart from any application of yours."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from celery import Celery

from embedq import celeryconfig as config
from embedq.tasks import stock_workers

__all__ = ["Application", "app", "config", "key_prefix"]


class Application(Celery):
    """A Celery application none of whose workers lacks an engine.

    `celery -A embedq.tasks worker`, `app.worker_main(...)` and `app.Worker(...).start()` run one embedq worker, as
    `python -m embedq.workers.worker` does.
    """

    @cached_property
    def Worker(self) -> Any:  # noqa: N802  # Celery's name
        """Stands for Celery's stock worker, and runs one of ours: see `embedq.tasks.stock_workers.EngineWorkerStart`."""
        return self.subclass_with_self(stock_workers.EngineWorkerStart, name="Worker")

    @cached_property
    def EngineWorker(self) -> Any:  # noqa: N802  # beside Celery's
        """Celery's worker class for a process that has an engine: the only one that may take embedq's jobs."""
        return self.subclass_with_self("celery.apps.worker:Worker", name="EngineWorker", has_engine=True)

    def _warn_duplicate_task_name(self, *_: Any) -> None:
        """Say nothing: Celery copies tasks of all applications here, and one named as ours is right where it is.

        The first `embed` of any module `tasks.py` is called `tasks.embed`. Ours stays ours here, as theirs does there.
        """


# Not the current app: `shared_task`s of the application must stay with the application's own. And without Celery's
# fix-up for Django, which would make the first application of a process, ours, the default one of every other thread.
app = Application("embedq", set_as_current=False, fixups=())
# Without `wire`, which may hold the server's password: workers show Flower all they are configured with.
app.config_from_object({name: value for name, value in vars(config).items() if name != "wire"})
stock_workers.protect(app)


def key_prefix(of: Celery) -> str:
    """What an application writes before every key of its jobs: kombu's `global_keyprefix`, by default nothing."""
    return str(of.conf.broker_transport_options.get("global_keyprefix") or "")
