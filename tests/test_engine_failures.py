"""Jobs that fail in the engine: which error they get, and that nobody else is touched. Over a fake model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from embedq.core.batching.job import Job
from embedq.core.engine import Engine
from embedq.core.errors import DeviceFailure, InvalidInput
from embedq.core.options import EmbedOptions
from embedq.core.sequence import Sequence, Tokens
from tests.checkpoints import PATIENCE_S, FakeModel, expected_rows
from tests.engines import NEAR, settings, texts_of
from tests.loops import wait_for_waiting


def test_a_text_the_model_fails_on_fails_its_job_and_not_its_neighbours(engine: Engine, model: FakeModel) -> None:
    def fail_on_exclamation(batch: list[Sequence]) -> None:
        if any(ord("!") in one.tokens.ids for one in batch):
            raise RuntimeError("the device said no")

    model.before_rows = fail_on_exclamation
    model.gate.clear()
    with ThreadPoolExecutor(4) as callers:
        blocker = callers.submit(engine.embed, ["blocker"])
        assert model.begun.acquire(timeout=PATIENCE_S)
        good = [callers.submit(engine.embed, texts_of(seed, 5, NEAR)) for seed in range(2)]
        bad = callers.submit(engine.embed, ["fine".ljust(30, "."), "bad!".ljust(30, "."), "fine too".ljust(30, ".")])
        wait_for_waiting(engine.backlog, 13)
        model.gate.set()
        with pytest.raises(DeviceFailure, match="model fake failed on a single sequence: RuntimeError"):
            bad.result(PATIENCE_S)
        for seed, job in enumerate(good):
            np.testing.assert_array_equal(job.result(PATIENCE_S).dense, expected_rows(texts_of(seed, 5, NEAR)))
        blocker.result(PATIENCE_S)
    assert len(model.batches[1]) == 13


def test_a_bad_later_slice_withdraws_the_earlier_ones(engine: Engine, model: FakeModel) -> None:
    encode = model.encode_texts
    may_encode = threading.Event()

    def encode_or_refuse(texts: list[str], options: EmbedOptions) -> list[Tokens]:
        if "bad" in texts:
            assert may_encode.wait(PATIENCE_S)
            raise InvalidInput("text 500 cannot be encoded")
        return encode(texts, options)

    model.encode_texts = encode_or_refuse  # type: ignore[method-assign]
    model.gate.clear()
    with ThreadPoolExecutor(2) as callers:
        blocker = callers.submit(engine.embed, ["blocker"])
        assert model.begun.acquire(timeout=PATIENCE_S)
        bad = callers.submit(engine.embed, [f"good {number}" for number in range(500)] + ["bad"])
        wait_for_waiting(engine.backlog, 256)
        may_encode.set()
        with pytest.raises(InvalidInput, match="text 500"):
            bad.result(PATIENCE_S)
        wait_for_waiting(engine.backlog, 0)
        model.gate.set()
        blocker.result(PATIENCE_S)
    assert [len(batch) for batch in model.batches] == [1]


def test_of_a_job_that_failed_the_rest_is_neither_encoded_nor_computed(engine: Engine, model: FakeModel) -> None:
    encode, encoded, has_failed_alone = model.encode_texts, [0], threading.Event()

    def encode_and_count(texts: list[str], options: EmbedOptions) -> list[Tokens]:
        if encoded[0] >= 2:
            assert has_failed_alone.wait(PATIENCE_S)
        encoded[0] += 1
        return encode(texts, options)

    def fail(batch: list[Sequence]) -> None:
        if len(batch) == 1 and batch[0].length > 1:  # not the probe, which the device passes
            has_failed_alone.set()
        if batch[0].length > 1:
            raise RuntimeError("the device said no")

    model.encode_texts = encode_and_count  # type: ignore[method-assign]
    model.before_rows = fail
    with pytest.raises(DeviceFailure, match="the device said no"):
        engine.embed([f"text {number}" for number in range(256 * 200)])
    assert encoded[0] < 100
    assert engine.is_alive


def test_a_dead_engine_says_why_to_its_owner_and_to_all_who_wait_or_come(model: FakeModel) -> None:
    told: list[tuple[str, int]] = []
    jobs: list[Job] = []
    model.gate.clear()
    chosen = settings((model,), hang_timeout_s=0.4, max_batch_sequences=1)
    engine = Engine({"fake": model}, chosen, lambda reason: told.append((reason, sum(job.is_over for job in jobs))))
    jobs += [engine.submit(lambda: engine.calls.embed(["a"])) for _ in range(3)]
    reasons = [str(job.answer.exception(PATIENCE_S)) for job in jobs]
    assert "no progress" in reasons[0]
    assert reasons == [reasons[0]] * 3
    assert told == [(reasons[0], 0)]  # first of all, so that a process can end before anyone is answered
    assert not engine.is_alive
    with pytest.raises(DeviceFailure, match="no progress"):
        engine.embed(["late"])
    engine.close()
    model.gate.set()


def test_jobs_are_answered_even_if_their_owner_fails_to_hear_why(model: FakeModel) -> None:
    def fail(reason: str) -> None:
        raise RuntimeError("of the owner")

    class Panic(BaseException):
        """What ends the device thread."""

    def panic(batch: Any) -> None:
        raise Panic

    model.before_rows = panic
    died: list[Any] = []
    before, threading.excepthook = threading.excepthook, died.append
    try:
        with Engine({"fake": model}, settings((model,)), fail) as engine:
            assert engine.is_alive
            with pytest.raises(DeviceFailure, match="Panic"):
                engine.embed(["a"])
        assert not engine.is_alive
    finally:
        threading.excepthook = before
    assert [str(one.exc_value) for one in died] == ["of the owner"]
