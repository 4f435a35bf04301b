"""What a heartbeat's line carries through the pipe."""

from __future__ import annotations

import json
import os
import threading

import pytest

from embedq import __version__
from embedq.tasks.speeds import Speed
from embedq.workers.context import Lifecycle
from embedq.workers.heartbeat_line import READY, Beat
from embedq.workers.monitoring.heartbeat import Heart


def test_a_beat_comes_out_of_its_line_as_it_went_in() -> None:
    models = {"m": Speed(1e3, {"embed.m": 12.5}), "unmeasured": Speed()}
    beat = Beat(READY, "m.cpu0@host", "m", {"embed.m": "m"}, num_jobs=3, models=models)
    assert beat.line().endswith(b"}\n")
    assert Beat.read(beat.line()) == beat
    assert Beat.read(Beat().line()) == Beat()


def test_a_beat_of_a_newer_worker_is_read_without_what_we_do_not_know() -> None:
    newer = json.loads(Beat(READY, "m.cpu0@host", num_jobs=3, models={"m": Speed(5.0)}).line())
    newer |= {"version": "9.0", "num_wings": 2, "models": {"m": {"tokens_per_second": 5.0, "colour": "red"}}}
    beat = Beat.read(json.dumps(newer).encode())
    assert (beat.state, beat.num_jobs, beat.models, beat.version) == (READY, 3, {"m": Speed(5.0)}, "9.0")


def test_a_beat_of_an_older_worker_has_defaults_for_what_is_missing() -> None:
    beat = Beat.read(b'{"state": "ready", "num_jobs": 3, "models": {"m": {}}}')
    assert (beat.num_jobs, beat.num_batches, beat.models, beat.version) == (3, 0, {"m": Speed()}, "")
    assert Beat.read(b"{}") == Beat(version="")


def test_a_field_that_changed_its_type_is_left_out() -> None:
    beat = Beat.read(b'{"num_jobs": "three", "waiting": [1], "models": 5, "busy": 1, "queues": {"a": "m"}}')
    assert beat == Beat(version="", queues={"a": "m"}, busy=1)


@pytest.mark.parametrize("line", [b"[]", b"3", b"no json"])
def test_what_is_no_beat_is_a_value_error(line: bytes) -> None:
    with pytest.raises(ValueError, match=r"heartbeat|Expecting"):
        Beat.read(line)


def test_a_beat_names_the_version_that_wrote_it() -> None:
    assert json.loads(Beat().line())["version"] == __version__


def test_a_launcher_that_reads_nothing_keeps_no_worker_waiting_and_gets_whole_lines_later() -> None:
    reading, writing = os.pipe()
    heart = Heart(Lifecycle(), writing)
    line = Beat(worker="w" * 10_000).line()
    filling = threading.Thread(target=lambda: [heart._send(line) for _ in range(1000)], daemon=True)
    filling.start()
    filling.join(20)
    assert not filling.is_alive()
    os.set_blocking(reading, False)
    got = b""
    for _ in range(2):  # what the pipe held; then the rest of the last line, and another
        try:
            while part := os.read(reading, 65536):
                got += part
        except BlockingIOError:
            heart._send(line)
    while True:
        try:
            got += os.read(reading, 65536)
        except BlockingIOError:
            break
    assert got.endswith(b"\n")
    lines = got.splitlines(keepends=True)
    assert len(lines) > 3
    assert set(lines) == {line}
    os.close(reading)
    heart._send(line)
    os.close(writing)
