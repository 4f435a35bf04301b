"""embedq's own Celery application: the settings of `celeryconfig.py`, apart from any application of yours."""

from __future__ import annotations

import logging
import os
import threading
import time
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

from celery import Celery
from celery.app.control import Control

from embedq.core.errors import InvalidSettings
from embedq.core.setting_names import misspelt_variables, variable_of
from embedq.tasks import stock_workers, wrong_settings
from embedq.tasks.addresses import address_of, key_prefix, shown
from embedq.tasks.celery_private import CELERY_VARIABLES, OwnCelery
from embedq.tasks.job_channel import job_transport
from embedq.tasks.queue_cap import QueueCap, configured_cap

try:
    from embedq import celeryconfig as config
except InvalidSettings as error:
    wrong_settings.end_command(error)
    raise

log = logging.getLogger(__name__)

#: Seconds between two looks for an embedded server: a look at each job took a fifth of what it costs to send one.
_LOOK_S = 0.05

__all__ = ["Application", "app", "config", "key_prefix"]


class JsonControl(Control):
    """Celery's remote control, in JSON whatever jobs and results travel in.

    All workers on one database share one exchange of commands, and answer each other when they start. Celery sends
    commands by `task_serializer`: in ours, a worker of an application that knows only JSON could not start beside
    embedq's (ContentDisallowed), and logged each `inspect` as a critical error.
    """

    def __init__(self, app: Celery | None = None) -> None:
        super().__init__(app)
        self.mailbox.serializer = "json"


class Application(OwnCelery):
    """A Celery application none of whose workers lacks an engine, and that follows this user's embedded server.

    `celery -A embedq.tasks worker`, `app.worker_main(...)` and `app.Worker(...).start()` run one embedq worker, as
    `python -m embedq.workers.worker` does.
    """

    control_cls = JsonControl

    #: How much a queue may hold for this process to send to it; None for any number. Workers heed none: what follows a
    #: job, or repeats it, has no producer that could send it again.
    cap: QueueCap | None = None

    #: Whether this is a worker's process, whose connections are all of its own transport.
    has_engine = False

    #: When to look again for an embedded server.
    _next_look_s = 0.0

    #: The URL that was looked up last; whoever sets another one in the configuration has chosen it.
    _looked_up: str | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        #: Applications connected with this one (`tasks.connect`), in the order in which they were.
        self.connected: WeakKeyDictionary[Celery, None] = WeakKeyDictionary()
        self._is_eager_for_others = False
        self._follow_lock = threading.Lock()
        self._seen = threading.local()

    @property
    def pool(self) -> Any:
        """Celery's pool of connections, on the server that is used now."""
        self.follow()
        return super().pool

    @property
    def backend(self) -> Any:
        """Celery's result backend, on the server that is used now."""
        self.follow()
        return super().backend

    def producer_or_acquire(self, producer: Any = None) -> Any:
        """Celery's producer, on the server that is used now."""
        self.follow()
        return super().producer_or_acquire(producer)

    def connection_for_read(self, url: Any = None, **options: Any) -> Any:
        """Celery's connection for reading, to the server that is used now."""
        self.follow()
        return super().connection_for_read(url, **options)

    def connection_for_write(self, url: Any = None, **options: Any) -> Any:
        """Celery's connection for writing, to the server that is used now; jobs beyond `cap` are refused on it."""
        self.follow()
        if not self.has_engine:
            scheme = str(url or self.conf.broker_write_url).partition("://")[0].partition("+")[0]
            options.setdefault("transport", job_transport(scheme, self.cap))
        return super().connection_for_write(url, **options)

    def follow(self) -> None:
        """Use the embedded server that runs now, if the user named no server: it may have been started since.

        Any thread may call it. While none runs, the last one stays.
        """
        if self._looked_up is None or config.is_server_named():
            return
        now_s = time.monotonic()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + _LOOK_S
            self._look_up()
        if getattr(self._seen, "url", self._looked_up) != self._looked_up:
            self.drop_thread_backend()  # Celery keeps one for each thread
        self._seen.url = self._looked_up

    def _look_up(self) -> None:
        url = config.embedded_url()
        if url and url != self._looked_up:
            with self._follow_lock:
                if url != self._looked_up and self.conf.broker_url == self._looked_up:
                    self.conf.update(broker_url=url, result_backend=url)
                    self.drop_connections()
                    self._looked_up = url

    def follow_eager(self) -> None:
        """Compute jobs where they are sent if a connected application computes its tasks so, and for as long as it does."""
        is_eager = any(map(_is_eager, list(self.connected)))
        if is_eager and not self.conf.task_always_eager:
            self.conf.task_always_eager = self._is_eager_for_others = True
        elif self._is_eager_for_others and not is_eager:
            self.conf.task_always_eager = self._is_eager_for_others = False

    def move_to(self, url: str) -> None:
        """Use the server at `url` from now on, and have the connected applications that used ours use it too. For tests."""
        former = self.conf.broker_url
        for app in [self, *self.connected]:
            if app is self or (app.configured and app.conf.broker_url == former):
                app.conf.update(broker_url=url, result_backend=url)
        self.drop_connections()

    def look_up_from(self, url: str) -> None:
        """Follow the embedded server, beginning with `url`, as `celeryconfig.redis_url` found it."""
        self._looked_up = url

    @cached_property
    def Worker(self) -> Any:  # noqa: N802  # Celery's name
        """Stands for Celery's stock worker, and runs one of ours: see `embedq.tasks.stock_workers.EngineWorkerStart`."""
        return self.subclass_with_self(stock_workers.EngineWorkerStart, name="Worker")

    @cached_property
    def AsyncResult(self) -> Any:  # noqa: N802  # Celery's names
        """Celery's result of a job, for which a task of an application may wait: see `embedq.tasks.job_results`."""
        return self.subclass_with_self("embedq.tasks.job_results:JobResult", reverse="AsyncResult")

    @cached_property
    def ResultSet(self) -> Any:  # noqa: N802
        """The same of several jobs."""
        return self.subclass_with_self("embedq.tasks.job_results:JobResultSet", reverse="ResultSet")

    @cached_property
    def GroupResult(self) -> Any:  # noqa: N802
        """The same of a group."""
        return self.subclass_with_self("embedq.tasks.job_results:JobGroupResult", reverse="GroupResult")

    @cached_property
    def EngineWorker(self) -> Any:  # noqa: N802  # beside Celery's
        """Celery's worker class for a process that has an engine: the only one that may take embedq's jobs."""
        return self.subclass_with_self("celery.apps.worker:Worker", name="EngineWorker", has_engine=True)


# Not the current app: `shared_task`s of the application must stay with the application's own. And without Celery's
# fix-up for Django, which would make the first application of a process, ours, the default one of every other thread.
# With Celery's usual loader, whatever CELERY_LOADER says: that would be another application's.
app = Application("embedq", set_as_current=False, fixups=(), loader="celery.loaders.app:AppLoader")
# Without `wire`, which may hold the server's password: workers show Flower all they are configured with.
app.config_from_object({name: value for name, value in vars(config).items() if name != "wire"})
app.look_up_from(config.broker_url)
app.cap = configured_cap(config.wire)
stock_workers.protect(app)


def _is_eager(app: Celery) -> bool:
    try:
        return bool(app.conf.task_always_eager)
    except Exception:  # its configuration cannot be read, which is said where its own tasks are sent
        return False


def warn_of_celery_variables(own: str) -> None:
    """Log a warning for each of Celery's variables that names another server than `own`, ours; none is read."""
    for variable in CELERY_VARIABLES:
        url = os.environ.get(variable, "")
        address = address_of(url)
        if url not in ("", own) and (address is None or address != address_of(own)):
            log.warning(
                "%s is %s and is ignored: embedq uses %s (EMBEDQ_REDIS_URL)",
                variable,
                shown(url),
                shown(own),
                extra={"action": "variable_ignored", "variable": variable},
            )


def warn_of_unknown_variables() -> None:
    """Log a warning for each variable EMBEDQ_… that nobody reads; a worker refuses it, a producer need not care."""
    for variable, meant in misspelt_variables().items():
        log.warning(
            "%s is no setting of embedq%s",
            variable,
            f", did you mean {variable_of(meant)}?" if meant else "",
            extra={"action": "unknown_variable", "variable": variable},
        )


warn_of_celery_variables(config.broker_url)
warn_of_unknown_variables()
