"""What a heartbeat's line carries through the pipe."""

from __future__ import annotations

from embedq.tasks.speeds import Speed
from embedq.workers.heartbeat_line import READY, Beat


def test_a_beat_comes_out_of_its_line_as_it_went_in() -> None:
    models = {"m": Speed(1e3, {"embed.m": 12.5}), "unmeasured": Speed()}
    beat = Beat(READY, "m.cpu0@host", "m", {"embed.m": "m"}, num_jobs=3, models=models)
    assert beat.line().endswith(b"}\n")
    assert Beat.read(beat.line()) == beat
    assert Beat.read(Beat().line()) == Beat()
