"""A job's timings: what they are, that only who asks gets them, and how they travel."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import msgpack
import numpy as np
import pytest

from embedq import __version__
from embedq.core.codec import pack, unpack
from embedq.core.engine import Engine
from embedq.core.errors import InvalidInput
from embedq.core.options import EmbedOptions, RerankOptions
from embedq.core.results import Embeddings, Ranking, Timings
from tests.checkpoints import PATIENCE_S, FakeModel
from tests.engines import busy, running
from tests.loops import wait_for_waiting

TIMINGS = Timings(0.5, 0.25, 1.5, 32, 1000, __version__)


def test_only_who_asks_gets_them(engine: Engine) -> None:
    assert engine.embed(["a text"]).timings is None
    timings = engine.embed(["a text", "another"], timings=True).timings
    assert timings is not None
    assert (timings.batch_size, timings.num_tokens) == (2, len("a text") + len("another"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        timings.waited_s = 1.0  # type: ignore[misc]


def test_they_are_the_seconds_that_passed(model: FakeModel) -> None:
    def pause(batch: object) -> None:
        time.sleep(0.02)  # what a pass takes

    model.before_launch = pause
    with running(model) as engine:
        begun_s = time.monotonic()
        timings = engine.embed(["a text"], timings=True).timings
        took_s = time.monotonic() - begun_s
    assert timings is not None
    assert timings.computed_s >= 0.02
    assert timings.waited_s + timings.encoded_s + timings.computed_s <= took_s
    assert min(timings.waited_s, timings.encoded_s) >= 0


def test_a_job_behind_another_has_waited_for_it(engine: Engine, model: FakeModel) -> None:
    with busy(engine, model):
        job = engine.submit(lambda: engine.calls.embed(["a text"], timings=True))
        wait_for_waiting(engine.backlog, 1)
        time.sleep(0.03)  # what it waits
    assert job.answer.result(PATIENCE_S).timings.waited_s >= 0.03


def test_the_largest_batch_counts_and_those_of_others_with_it(engine: Engine, model: FakeModel) -> None:
    with busy(engine, model):
        jobs = [
            engine.submit(lambda text=text: engine.calls.embed([text], timings=True))  # type: ignore[misc]
            for text in ("one text", "two text", "six text")
        ]
        wait_for_waiting(engine.backlog, 3)
    assert {job.answer.result(PATIENCE_S).timings.batch_size for job in jobs} == {3}


def test_rankings_and_scores_carry_them_too(engine: Engine) -> None:
    timings = engine.rerank("q", ["a", "b"], timings=True).timings
    assert timings is not None
    assert timings.batch_size >= 1
    assert engine.rerank("q", ["a"]).timings is None
    scores: Any = engine.score([("q", "a"), ("q", "b")], timings=True)
    assert scores.timings.computed_s >= 0
    plain = engine.score([("q", "a"), ("q", "b")])
    assert type(plain) is np.ndarray
    np.testing.assert_array_equal(scores, plain)


def test_a_job_of_no_texts_has_taken_no_time(engine: Engine) -> None:
    assert engine.embed([], timings=True).timings == Timings(0.0, 0.0, 0.0, 0, 0, __version__)


@pytest.mark.parametrize("options", [EmbedOptions, RerankOptions])
@pytest.mark.parametrize("given", [1, "yes", None])
def test_only_a_flag_asks_for_them(options: type[EmbedOptions | RerankOptions], given: object) -> None:
    with pytest.raises(InvalidInput, match="timings must be one of True, False"):
        options.checked({"timings": given})


@pytest.mark.parametrize(
    "result",
    [
        Embeddings(np.ones((1, 2), np.float32), model="m", timings=TIMINGS),
        Ranking(np.ones(1, np.float32), np.zeros(1, np.int32), "m", timings=TIMINGS),
    ],
    ids=["embeddings", "ranking"],
)
def test_they_travel_as_a_map_of_numbers(result: Embeddings | Ranking) -> None:
    packed = pack(result)
    assert unpack(packed).timings == TIMINGS
    assert msgpack.unpackb(packed)["timings"] == dataclasses.asdict(TIMINGS)
    without = pack(dataclasses.replace(result, timings=None))
    assert b"timings" not in without
    assert unpack(without).timings is None  # and so are results that were stored before there were any


@pytest.mark.parametrize(
    "timings",
    [
        1,
        "x",
        [],
        {},
        {**dataclasses.asdict(TIMINGS), "waited_s": "long"},
        {"waited_s": 1.0},
        {**dataclasses.asdict(TIMINGS), "version": 2},
    ],
)
def test_what_is_no_timings_is_refused(timings: object) -> None:
    fields = Embeddings(np.ones((1, 2), np.float32)).to_map() | {"timings": timings}
    with pytest.raises(ValueError, match="malformed timings"):
        Embeddings.from_map(fields)


def test_a_workers_version_is_in_them() -> None:
    assert dataclasses.asdict(TIMINGS)["version"] == __version__


@pytest.mark.parametrize(
    ("changes", "version"),
    [({"version": None}, ""), ({"version": "9.0.0", "stored_s": 0.5, "device": {"kind": "cuda"}}, "9.0.0")],
    ids=["older", "newer"],
)
def test_those_of_an_older_and_of_a_newer_worker_are_read(changes: dict[str, object], version: str) -> None:
    arrived = {name: one for name, one in (dataclasses.asdict(TIMINGS) | changes).items() if one is not None}
    fields = Embeddings(np.ones((1, 2), np.float32)).to_map() | {"timings": arrived}
    assert Embeddings.from_map(fields).timings == dataclasses.replace(TIMINGS, version=version)


def test_a_reader_of_0_1_0_finds_what_it_reads() -> None:
    """It took these names and no others, each a number."""
    travelled = msgpack.unpackb(pack(Embeddings(np.ones((1, 2), np.float32), timings=TIMINGS)))["timings"]
    names = ("waited_s", "encoded_s", "computed_s", "batch_size", "num_tokens")
    assert all(type(travelled[name]) in (int, float) for name in names)
