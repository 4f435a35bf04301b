"""Results while the server cannot be written to: kept, retried, bounded, never acknowledged early."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, signals

from embedq.core.errors import ServerUnavailable
from embedq.workers.jobs import result_backend, result_writer
from tests.own_server import OwnServer
from tests.traced_jobs import application, blob, run


def test_while_the_server_refuses_writes_results_are_kept_and_the_operator_warned(
    app: Celery, own: OwnServer, caplog: pytest.LogCaptureFixture
) -> None:
    own.client.config_set("maxmemory", 1)
    freed = threading.Timer(0.5, own.client.config_set, ("maxmemory", 0))
    with caplog.at_level(logging.WARNING), app.backend.batch():
        jobs = [run(app, "embed_one", index) for index in range(3)]
        freed.start()
    freed.join()
    assert [blob(own, job)["status"] for job in jobs] == ["SUCCESS"] * 3
    warnings = [record for record in caplog.records if getattr(record, "action", "") == "results_wait"]
    assert warnings
    fields = vars(warnings[0])
    assert fields["num_results"] == 3
    assert "maxmemory" in fields["error"]


def test_a_server_that_crashes_and_comes_back_gets_the_results(tmp_path: Path) -> None:
    computed, crashed = threading.Event(), threading.Event()

    def work() -> None:
        with app.backend.batch():
            for index in range(3):
                run(app, "embed_one", index, job_id=f"job-{index}")
            computed.set()
            assert crashed.wait(30)

    with OwnServer(tmp_path) as own, application(own.url) as app:
        worker = threading.Thread(target=work)
        worker.start()
        assert computed.wait(30)
        own.kill()
        crashed.set()
        own.start()
        worker.join(30)
        assert [blob(own, f"job-{index}")["status"] for index in range(3)] == ["SUCCESS"] * 3


def run_batch(app: Celery, num_jobs: int, max_outage_s: float) -> None:
    with app.backend.batch(max_outage_s):
        for _ in range(num_jobs):
            run(app, "embed_one")


@pytest.mark.timing
def test_an_outage_beyond_the_bound_is_an_error_and_the_next_batch_is_clean(app: Celery, own: OwnServer) -> None:
    own.client.config_set("maxmemory", 1)
    begun_s = time.monotonic()
    with pytest.raises(ServerUnavailable, match=r"2 results could not be stored for 0 s \(.*must not be acknowledged"):
        run_batch(app, num_jobs=2, max_outage_s=0.3)
    assert 0.3 <= time.monotonic() - begun_s < 5
    own.client.config_set("maxmemory", 0)
    with app.backend.batch():
        run(app, "embed_one", job_id="three")
    assert own.client.keys("celery-task-meta-*") == [b"celery-task-meta-three"]


def test_a_large_batch_is_written_early_and_in_several_calls(
    app: Celery, own: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result_backend, "_MAX_HELD_BYTES", 16_000)
    monkeypatch.setattr(result_writer, "_MAX_CALL_BYTES", 4_000)
    run(app, "embed_one")
    before = own.count("evalsha")
    most = 0
    with app.backend.batch():
        for index in range(20):  # of 1.8 kB each
            run(app, "embed_one", index)
            most = max(most, app.backend._held.num_bytes)
    assert most < 20_000
    assert own.count("evalsha") - before == 10
    assert own.client.dbsize() == 21


@pytest.mark.timing
def test_memory_pressure_during_an_outage_never_reaches_a_job(
    app: Celery, own: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = []

    def note(**details: Any) -> None:
        broken.append(details)

    signals.task_internal_error.connect(note)
    monkeypatch.setattr(result_backend, "_MAX_HELD_BYTES", 1)
    own.client.config_set("maxmemory", 1)
    begun_s = time.monotonic()
    with pytest.raises(ServerUnavailable):
        run_batch(app, num_jobs=10, max_outage_s=0.3)
    assert time.monotonic() - begun_s < 2  # waited once, not once per job
    assert broken == []
    own.client.config_set("maxmemory", 0)
