"""Calls to the engine, over a fake model: what comes back, in which order, and which error."""

from __future__ import annotations

import random
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from embedq.core.engine import Engine
from embedq.core.errors import DeviceFailure, InvalidInput, InvalidSettings, UnknownModel
from tests.checkpoints import PATIENCE_S, FakeModel, expected_rows, row_of
from tests.engines import NEAR, busy, running, settings, texts_of
from tests.loops import wait_for_waiting


def test_vectors_come_in_the_order_of_the_texts(engine: Engine) -> None:
    texts = texts_of(0, 600)  # several slices of encoding, many batches
    np.testing.assert_array_equal(engine.embed(texts).dense, expected_rows(texts))


def test_many_jobs_share_one_forward_pass(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    with ThreadPoolExecutor(9) as callers:
        blocker = callers.submit(engine.embed, ["blocker"])
        assert model.begun.acquire(timeout=PATIENCE_S)
        jobs = [callers.submit(engine.embed, texts_of(seed, 3, NEAR)) for seed in range(8)]
        wait_for_waiting(engine.backlog, 24)
        model.gate.set()
        for seed, job in enumerate(jobs):
            np.testing.assert_array_equal(job.result(PATIENCE_S).dense, expected_rows(texts_of(seed, 3, NEAR)))
        blocker.result(PATIENCE_S)
    assert [len(batch) for batch in model.batches] == [1, 24]


@pytest.mark.parametrize("seed", range(3))
def test_every_job_gets_its_own_rows_in_order_under_random_interleaving(seed: int) -> None:
    random_ = random.Random(seed)
    jobs = [texts_of(100 * seed + number, random_.choice([1, 2, 7, 40, 300])) for number in range(60)]
    model = FakeModel()
    with running(model, max_batch_tokens=300, max_waiting_tokens=2000) as engine, ThreadPoolExecutor(16) as callers:
        called = [callers.submit(engine.embed, texts, priority=random_.randint(0, 9)) for texts in jobs]
        for texts, job in zip(jobs, called, strict=True):
            np.testing.assert_array_equal(job.result(PATIENCE_S).dense, expected_rows(texts))
    num_different = len({text for texts in jobs for text in texts})
    assert num_different <= sum(len(batch) for batch in model.batches) <= sum(map(len, jobs))


def test_interactive_jobs_go_before_bulk_jobs_that_came_first(engine: Engine, model: FakeModel) -> None:
    model.gate.clear()
    with ThreadPoolExecutor(3) as callers:
        callers.submit(engine.embed, ["blocker"])
        assert model.begun.acquire(timeout=PATIENCE_S)
        callers.submit(engine.embed, ["bulk"], priority=9)
        wait_for_waiting(engine.backlog, 1)
        callers.submit(engine.embed, ["interactive"], priority=0)
        wait_for_waiting(engine.backlog, 2)
        model.gate.set()
    assert [batch[0].length for batch in model.batches] == [len("blocker"), len("interactive"), len("bulk")]


def test_closing_answers_what_was_asked_and_later_calls_fail_clearly(model: FakeModel) -> None:
    model.gate.clear()
    with ThreadPoolExecutor(5) as callers:
        with running(model) as engine:
            asked: list[Future[Any]] = [callers.submit(engine.embed, ["blocker"])]
            assert model.begun.acquire(timeout=PATIENCE_S)
            asked += [callers.submit(engine.embed, texts_of(seed, 3)) for seed in range(4)]
            wait_for_waiting(engine.backlog, 12)
            model.gate.set()
        assert all(job.result(PATIENCE_S) for job in asked)
        assert sum(len(batch) for batch in model.batches) == 13
        with pytest.raises(DeviceFailure, match="closed"):
            engine.embed(["late"])


def test_no_texts_give_no_vectors_and_no_pass(engine: Engine, model: FakeModel) -> None:
    result = engine.embed([], outputs=["dense", "colbert"])
    assert (np.asarray(result).shape, np.asarray(result).dtype.name, result.colbert) == ((0, 2), "float32", [])
    assert not model.batches


def test_outputs_dimensions_types_and_scaling_are_as_asked(engine: Engine) -> None:
    texts = ["abc", "de"]
    both = engine.embed(texts, outputs=["dense", "colbert"])
    assert both.colbert is not None
    assert [row.shape for row in both.colbert] == [(3, 2), (2, 2)]
    assert engine.embed(texts, outputs=["colbert"]).dense is None
    np.testing.assert_array_equal(engine.embed(texts, dimensions=1).dense, expected_rows(texts)[:, :1])
    np.testing.assert_allclose(np.linalg.norm(engine.embed(texts, normalize=True), axis=1), 1, atol=1e-6)
    quantised = engine.embed(texts, dtype="int8")
    assert (repr(quantised), np.asarray(quantised.int8_ranges).shape) == ("2 × 2 int8", (2, 2))
    assert engine.embed(texts).model == "fake"
    instructed = engine.embed(texts, instruction="find: ").dense
    np.testing.assert_array_equal(instructed, expected_rows(["find: abc", "find: de"]))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"dimensions": 3}, "up to 2 for model fake; given 3"),
        ({"outputs": ["sparse"]}, "has no 'sparse' output; it has colbert, dense"),
        ({"dtype": "float64"}, "dtype"),
        ({"nonsense": 1}, "unknown option 'nonsense'"),
    ],
)
def test_what_the_model_cannot_do_is_refused_before_anything_is_computed(
    engine: Engine, model: FakeModel, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidInput, match=told):
        engine.embed(["abc"], **given)
    with pytest.raises(InvalidInput, match="texts"):
        engine.embed("abc")  # type: ignore[arg-type]
    assert not model.batches


def test_an_unknown_model_is_named_with_those_that_are_served() -> None:
    with running(FakeModel("first"), FakeModel("second")) as engine:
        with pytest.raises(UnknownModel, match=r"unknown model 'third'.* first, second"):
            engine.embed(["a"], model="third")
        with pytest.raises(UnknownModel, match=r"rerank needs model=.* first, second"):
            engine.rerank("a", ["b"])
        assert engine.embed(["a"], model="second").model == "second"


def test_the_only_model_that_can_serves_jobs_that_name_none() -> None:
    with running(FakeModel("embedder"), FakeModel("reranker", "cross_encoder")) as engine:
        assert (engine.calls.default_embed, engine.calls.default_rerank) == ("embedder", "reranker")
        assert engine.rerank("a", ["b"]).model == "reranker"
        with pytest.raises(InvalidInput, match="reranker is a reranker"):
            engine.embed(["a"], model="reranker")
    with running(FakeModel("embedder")) as engine:
        assert engine.calls.default_rerank == "embedder"
    with running(FakeModel("reranker", "cross_encoder")) as engine, pytest.raises(UnknownModel, match="embed needs"):
        engine.embed(["a"])


def test_defaults_are_as_set() -> None:
    models = FakeModel("one"), FakeModel("two"), FakeModel("reranker", "cross_encoder")
    with running(*models, default_embed="two", default_rerank="one") as engine:
        assert (engine.embed(["a"]).model, engine.rerank("a", ["b"]).model) == ("two", "one")
    with running(models[0], default_embed="none") as engine, pytest.raises(UnknownModel):
        engine.embed(["a"])
    with pytest.raises(InvalidSettings, match="'reranker', a reranker"):
        Engine({model.spec.alias: model for model in models}, settings(models, default_embed="reranker"))


@pytest.mark.parametrize("num_passages", [0, 1, 255, 256, 600])
def test_passages_are_scored_by_the_cosine_in_their_order(engine: Engine, num_passages: int) -> None:
    query, passages = "query", texts_of(1, num_passages)
    ranking = engine.rerank(query, passages)
    rows = expected_rows([query, *passages]).astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(ranking.scores, rows[1:] @ rows[0], atol=1e-6)
    assert sorted(ranking.order) == list(range(num_passages))
    assert (np.diff(ranking.scores[ranking.order]) <= 0).all()
    assert (ranking.scores.dtype, ranking.order.dtype) == (np.float32, np.int32)


def test_passages_are_scored_by_max_sim_when_asked(engine: Engine) -> None:
    ranking = engine.rerank("ab", ["cd", "a"], mode="colbert")
    a, b, c, d = ((float(ord(one)), float(ord(one) + 1)) for one in "abcd")
    a, b, c, d = ((x / np.hypot(x, y), y / np.hypot(x, y)) for x, y in (a, b, c, d))  # as rows of length 1
    best_of = [[np.dot(q, p) for p in passage] for passage in ((c, d), (a,)) for q in (a, b)]
    expected = [np.mean([max(best_of[0]), max(best_of[1])]), np.mean([max(best_of[2]), max(best_of[3])])]
    np.testing.assert_allclose(ranking.scores, expected, rtol=1e-6)


def test_a_cross_encoder_gives_its_logits_and_has_no_mode() -> None:
    with running(FakeModel("reranker", "cross_encoder")) as engine:
        ranking = engine.rerank("q", ["bb", "a", "bb"], top_k=2)
        logits = [row_of(np.frombuffer(f"q|{one}".encode(), np.uint8))[0] for one in ("bb", "a", "bb")]
        np.testing.assert_allclose(ranking.scores, logits)
        assert list(ranking.order) == [0, 2]  # equal scores keep the order of the passages
        assert list(engine.rerank("q", ["a", "b"] * 50).order) == [*range(1, 100, 2), *range(0, 100, 2)]
        assert engine.rerank("q", ["a"], top_k=100).order.tolist() == [0]
        with pytest.raises(InvalidInput, match="option mode means nothing to model reranker, a cross encoder"):
            engine.rerank("q", ["a"], mode="dense")


def test_a_mode_the_model_has_no_output_for_is_refused(engine: Engine, model: FakeModel) -> None:
    model.outputs = frozenset({"dense"})
    with pytest.raises(InvalidInput, match="no 'colbert' output"):
        engine.rerank("q", ["a"], mode="colbert")


@pytest.mark.parametrize("logit", [-1000.0, -3.0, 0.0, 2.5, 1000.0])
def test_normalised_scores_are_the_sigmoid_even_of_extreme_logits(logit: float) -> None:
    model = FakeModel("reranker", "cross_encoder")
    model.after_rows = lambda rows: {"score": np.full_like(rows["score"], logit)}
    with running(model) as engine:
        ranking = engine.rerank("q", ["a"], normalize=True)
    assert ranking.scores.dtype == np.float32
    assert ranking.scores[0] == pytest.approx(0.0 if logit == -1000 else 1 / (1 + np.exp(-logit)), abs=1e-6)


@pytest.mark.parametrize("pad_token_id", [0, 1, 9])
def test_warming_up_runs_every_model_on_a_full_batch_of_legal_tokens(pad_token_id: int) -> None:
    model = FakeModel(max_length=128)
    model.spec = replace(model.spec, pad_token_id=pad_token_id)
    with running(model, max_batch_tokens=1024) as engine:
        engine.warm_up()
    (batch,) = model.batches
    assert (len(batch), batch[0].length) == (8, 128)
    # An id that every vocabulary has, and not the padding's.
    assert {int(token) for one in batch for token in one.tokens.ids} == {int(pad_token_id == 0)}


@pytest.mark.parametrize(
    ("device", "max_length", "asked", "budget"),
    [("cpu", 64, None, 2048), ("cpu", 8192, None, 2048), ("cuda:0", 64, None, 16_384), ("cpu", 64, 64, 64)],
)
def test_the_budget_is_the_settings_or_the_devices_whatever_the_longest_sequence(
    device: str, max_length: int, asked: int | None, budget: int
) -> None:
    model = FakeModel(max_length=max_length)
    model.device = device
    with running(model, max_batch_tokens=asked) as engine:
        assert engine.backlog.max_tokens("fake") == budget
        assert engine.stats()["max_batch_tokens"] == {"fake": budget}


def test_a_model_without_padding_takes_the_oldest_on_an_accelerator_and_like_lengths_on_a_cpu() -> None:
    lengths = [60, 3] * 20
    texts = [f"{number:0{length}}" for number, length in enumerate(lengths)]
    taken = {}
    for device in ("cuda:0", "cpu"):
        model = FakeModel()
        model.device, model.is_padded = device, False
        with running(model, max_batch_tokens=600) as engine:
            with busy(engine, model):
                job = engine.submit(lambda engine=engine: engine.calls.embed(texts))  # type: ignore[misc]
                wait_for_waiting(engine.backlog, len(texts))
            assert len(job.answer.result(PATIENCE_S)) == len(texts)
            stats = engine.stats()
        assert stats["padded_tokens"] == stats["tokens"] == sum(lengths) + len("blocker")
        taken[device] = [[one.length for one in batch] for batch in model.batches[1:]]
    assert [length for batch in taken["cuda:0"] for length in batch] == lengths
    assert max(map(sum, taken["cuda:0"])) in (567, 597, 600)  # as many as fit, whichever is next
    assert taken["cpu"][0] == [60] * 10


def test_passes_beside_each_other_are_smaller() -> None:
    with running(FakeModel(), cpu_streams=2) as engine:
        assert engine.stats()["max_batch_tokens"] == {"fake": 1024}


def test_a_budget_that_the_longest_sequence_does_not_fit_is_refused() -> None:
    model = FakeModel(max_length=64)
    with pytest.raises(InvalidSettings, match=r"max_batch_tokens is 63 .* 64 tokens.*EMBEDQ_MAX_BATCH_TOKENS"):
        Engine({"fake": model}, settings((model,), max_batch_tokens=63))


def test_models_share_the_device_with_a_budget_each() -> None:
    short, long = FakeModel("short", max_length=64), FakeModel("long", max_length=8192)
    short.spec = replace(short.spec, dimensions=2)
    with running(short, long, default_embed="short") as engine:
        engine.backlog.lower_budget("short", 512)
        assert engine.stats()["max_batch_tokens"] == {"short": 512, "long": 2048}
        assert len(engine.embed(texts_of(1, 100), model="long")) == 100
        assert len(engine.embed(texts_of(1, 100))) == 100
    assert all(len(batch) * max(one.length for one in batch) <= 512 for batch in short.batches)
