"""A call encodes its texts in order, each once where it scores by vectors, and refuses wrong arguments before that."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from embedq.core.batching.job import Call
from embedq.core.calls import CallBuilder
from embedq.core.errors import InvalidInput, UnknownModel
from embedq.core.settings import read_settings
from tests.checkpoints import FakeModel, row_of


def calls_of(*models: FakeModel, **chosen: Any) -> CallBuilder:
    aliases = {model.spec.alias: model for model in models}
    return CallBuilder(aliases, read_settings(models=dict.fromkeys(aliases, "/nowhere"), **chosen))


def encoded(call: Call, slice_rows: int = 1000) -> list[str]:
    """The texts of a call's rows, encoded in slices of that size."""
    parts = [call.rows[start : start + slice_rows] for start in range(0, call.num_rows, slice_rows)]
    return [bytes(tokens.ids.astype(np.uint8)).decode() for part in parts for tokens in call.encode(part)]


def result(call: Call) -> Any:
    """The call's result for the rows that the fake model computes."""
    tokens = call.encode(call.rows)
    return call.finish({"dense": [np.array(row_of(one.ids), np.float32) for one in tokens]})


def test_texts_are_rows_in_their_order() -> None:
    call = calls_of(FakeModel()).embed(["c", "a", "b", "a"])
    assert encoded(call, slice_rows=3) == ["c", "a", "b", "a"]


def test_pairs_are_rows_of_a_reranker() -> None:
    call = calls_of(FakeModel("reranker", "cross_encoder")).rerank("q", ["b", "a"])
    assert encoded(call, slice_rows=1) == ["q|b", "q|a"]


@pytest.mark.parametrize("slice_rows", [1, 2, 3, 4, 5, 1000])
def test_scoring_by_embedding_encodes_each_text_once_whatever_the_slices(slice_rows: int) -> None:
    pairs = [("q", "a"), ("r", "b"), ("q", "b"), ("r", "c")]
    assert encoded(calls_of(FakeModel()).score(pairs), slice_rows) == ["q", "r", "a", "b", "c"]


def test_scores_by_embedding_come_in_the_order_of_the_pairs() -> None:
    pairs = [("q", "aa"), ("r", "b"), ("q", "b"), ("aa", "aa")]
    sides = np.array([[row_of(np.frombuffer(text.encode(), np.uint8)) for text in pair] for pair in pairs])
    sides /= np.linalg.norm(sides, axis=2, keepdims=True)
    np.testing.assert_allclose(
        result(calls_of(FakeModel()).score(pairs)), (sides[:, 0] * sides[:, 1]).sum(1), atol=1e-6
    )


def test_queries_and_passages_are_encoded_each_in_its_own_way() -> None:
    call = calls_of(FakeModel()).rerank("same", ["same"], query_instruction="find: ")
    assert encoded(call) == ["find: same", "same"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda calls: calls.embed("no list"),
        lambda calls: calls.embed(["a", 1]),
        lambda calls: calls.embed(["a"], dimensions=3),
        lambda calls: calls.embed(["a"], outputs=["sparse"]),
        lambda calls: calls.embed(["a"], model="other"),
        lambda calls: calls.embed(["a"], model="reranker"),
        lambda calls: calls.rerank(1, ["a"]),
        lambda calls: calls.rerank("q", ["a"], top_k=-1),
        lambda calls: calls.rerank("q", ["a"], mode="dense"),
        lambda calls: calls.rerank("q", ["a"], model="fake", mode="sparse"),
        lambda calls: calls.score([("q",)]),
        lambda calls: calls.score([("q", "a")], nonsense=1),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_encoded(ask: Any) -> None:
    def encode(*given: Any) -> Any:
        raise AssertionError("encoded")

    embedder, reranker = FakeModel(), FakeModel("reranker", "cross_encoder")
    embedder.encode_texts = reranker.encode_pairs = encode  # type: ignore[assignment,method-assign]
    with pytest.raises((InvalidInput, UnknownModel)):
        ask(calls_of(embedder, reranker))
