"""The engine from an event loop: the same answers, nothing blocked, and a cancelled wait cancels the job."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from embedq.core.engine import Engine
from embedq.core.errors import InvalidInput
from tests.checkpoints import PATIENCE_S, FakeModel, expected_rows
from tests.engines import busy, left_over
from tests.loops import num_waiting, wait_for_waiting


def test_an_event_loop_gets_the_same_answers(engine: Engine) -> None:
    async def ask() -> tuple[Any, Any, Any, Any]:
        return await asyncio.gather(
            engine.aembed(["a", "bc"]),
            engine.arerank("q", ["a", "bc"], top_k=1),
            engine.ascore([("q", "a"), ("r", "bc")], priority=9),
            engine.aembed([1], priority=0),  # type: ignore[list-item]
            return_exceptions=True,
        )

    vectors, ranking, scores, failure = asyncio.run(ask())
    np.testing.assert_array_equal(vectors.dense, expected_rows(["a", "bc"]))
    np.testing.assert_array_equal(ranking.scores, engine.rerank("q", ["a", "bc"]).scores)
    np.testing.assert_array_equal(scores, engine.score([("q", "a"), ("r", "bc")]))
    assert len(ranking.order) == 1
    assert isinstance(failure, InvalidInput)


def test_an_event_loop_stays_free_while_it_waits(engine: Engine, model: FakeModel) -> None:
    async def ask() -> int:
        waiting = asyncio.ensure_future(engine.aembed(["a"]))
        assert await asyncio.to_thread(model.begun.acquire, timeout=PATIENCE_S)
        model.gate.set()  # only a free loop can do this
        return len(await asyncio.wait_for(waiting, PATIENCE_S))

    model.gate.clear()
    assert asyncio.run(ask()) == 1


def test_an_event_loop_that_waits_no_longer_withdraws_its_job(engine: Engine, model: FakeModel) -> None:
    async def ask() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.aembed(["a", "b"]), 0.01)
        task = asyncio.ensure_future(engine.arerank("q", ["c", "d"]))
        await asyncio.to_thread(wait_for_waiting, engine.backlog, 3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert num_waiting(engine.backlog) == 0

    with busy(engine, model):
        asyncio.run(ask())
    engine.embed(["e"])
    assert [len(batch) for batch in model.batches] == [1, 1]
    assert left_over(engine) == (0, 0, 0, 0)


def test_an_event_loop_that_is_gone_does_not_disturb_the_others(engine: Engine, model: FakeModel) -> None:
    with busy(engine, model):
        loop = asyncio.new_event_loop()
        awaited = loop.create_task(engine.aembed(["a"]))
        loop.run_until_complete(asyncio.sleep(0))
        other = engine.submit(lambda: engine.calls.embed(["b"]))
        wait_for_waiting(engine.backlog, 2)
        awaited._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
    assert len(other.answer.result(PATIENCE_S)) == 1
    assert len(engine.embed(["c"])) == 1
