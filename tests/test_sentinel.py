"""Results behind Sentinel: stored by a worker, read by a producer, with threads and in asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from embedq import tasks
from embedq.workers.embedded import _free_port, find_program
from tests.own_server import OwnServer
from tests.running import Running
from tests.test_awaiting import until
from tests.test_waiting import channels
from tests.traced_jobs import application, run


@pytest.fixture
def sentinel(own: OwnServer, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Settings of an application that asks a Sentinel where `own` is."""
    own.client.flushall()
    port, config = _free_port(), tmp_path / "sentinel.conf"
    config.write_text(f"port {port}\nbind 127.0.0.1\nsentinel monitor main 127.0.0.1 {own.port} 1\n")
    with Running([find_program(), str(config), "--sentinel"]) as running:
        running.wait_for("+monitor")
        yield {
            "result_backend": f"sentinel://127.0.0.1:{port}/0",
            "result_backend_transport_options": {"master_name": "main"},
        }


def test_results_go_where_sentinel_says(own: OwnServer, sentinel: dict[str, Any]) -> None:
    async def produce() -> Any:
        wait = asyncio.create_task(tasks.aget(producer.AsyncResult("two"), timeout=20))
        await until(lambda: len(channels(own)) == 1)
        run(app, "embed_one", 2.0, job_id="two")
        return await wait

    with application(own.url, **sentinel) as app, application(own.url, is_worker=False, **sentinel) as producer:
        with app.backend.batch():
            run(app, "embed_one", 1.0, job_id="one")
        assert producer.AsyncResult("one").get(timeout=20).dense[0, 0] == 1.0
        assert asyncio.run(produce()).dense[0, 0] == 2.0
