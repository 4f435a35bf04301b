"""A worker's wiring: nothing is left out without an error at its start, and every part gets the same."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import kombu
import pytest

from embedq.core.engine import Engine
from embedq.workers.broker import transport
from embedq.workers.celery_private import PoolBase
from embedq.workers.context import WorkerContext
from embedq.workers.jobs.held_job import HeldJobs
from embedq.workers.jobs.pool import EnginePool, pool_for
from embedq.workers.monitoring.health import Readiness, readiness_for
from tests.consuming import Consuming, context

FIELDS = [field.name for field in dataclasses.fields(WorkerContext)]


def fields_of(made: WorkerContext) -> dict[str, Any]:
    return {name: getattr(made, name) for name in FIELDS}


@pytest.mark.parametrize("missing", FIELDS)
def test_a_worker_cannot_be_wired_without_any_of_its_fields(missing: str) -> None:
    fields = fields_of(context())
    del fields[missing]
    with pytest.raises(TypeError, match=f"required keyword-only argument: '{missing}'"):
        WorkerContext(**fields)


def test_a_wired_worker_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        context().room = None  # type: ignore[misc, assignment]


def test_parts_that_nobody_wired_fail_as_they_are_built_and_name_what_is_missing(url: str, engine: Engine) -> None:
    with (
        kombu.Connection(url, transport=transport.Transport) as unwired,
        pytest.raises(AttributeError, match="context"),
    ):
        unwired.channel()
    with pytest.raises(AttributeError, match="jobs"):
        EnginePool(limit=1)
    with pytest.raises(AttributeError, match="context"):
        Readiness(cast(Any, None))
    assert issubclass(EnginePool, PoolBase)


def test_every_part_that_celery_builds_is_the_workers_own(url: str, engine: Engine) -> None:
    one, other = context(process="one"), context(process="other")
    held = HeldJobs(engine)
    with Consuming(url, ["a"], worker=one) as first, Consuming(url, ["a"], worker=other) as second:
        assert (first.channel.context, second.channel.context) == (one, other)
        assert (first.channel.worker, second.channel.worker) == ("one", "other")
        assert first.channel.qos.taken is not second.channel.qos.taken
    pool = pool_for(one, held)(limit=1)
    assert (pool.context, pool.jobs, pool.engine) == (one, held, engine)
    readiness_for(one)(None).start(None)
    assert (one.lifecycle.state, other.lifecycle.state) == ("ready", "loading")
