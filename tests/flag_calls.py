"""Golden calls of FlagEmbedding -> the same calls of our faces, and what they gave against what they should."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from embedq.core import flag
from embedq.core.sequence import Sequence, Tokens, Wanted
from tests.golden_cases import Call, difference

#: A row of the parity table: the call, which of its numbers, the largest difference, its share of what is allowed.
Row = tuple[str, str, float, float]


class Faces:
    """One face per different constructor call, kept until `close`."""

    def __init__(self) -> None:
        self._open: dict[str, Any] = {}

    def of(self, call: Call) -> Any:
        """The face that `call` is made to, with the constructor's arguments as they stand."""
        key = json.dumps([call.library, str(call.model), call.constructor])
        if key not in self._open:
            self._open[key] = getattr(flag, call.library)(str(call.model), **call.constructor)
        return self._open[key]

    def close(self) -> None:
        for face in self._open.values():
            face.close()


def make(face: Any, call: Call) -> Any:
    """Make the call, with its keywords as they stand."""
    return getattr(face, call.method)(call.inputs[0] if call.is_bare else call.inputs, **call.kwargs)


@contextmanager
def recorded(face: Any) -> Iterator[dict[tuple[int, int], Tokens]]:
    """The tokens that reach the network, by (number of the job, row): a call may be several jobs, one after the other."""
    model = face.engine.models["model"]
    launch = model.launch
    seen: dict[tuple[int, int], Tokens] = {}
    jobs: list[Any] = []

    def record(batch: list[Sequence], wanted: Wanted) -> Any:
        jobs.extend({job for sequence in batch for job, _ in sequence.rows}.difference(jobs))
        seen.update({(jobs.index(job), row): sequence.tokens for sequence in batch for job, row in sequence.rows})
        return launch(batch, wanted)

    model.launch = record
    try:
        yield seen
    finally:
        del model.launch


def check_ids(seen: dict[tuple[int, int], Tokens], call: Call) -> None:
    """The ids (and segments) are those that reached FlagEmbedding's network, in the order of the inputs."""
    if "query_input_ids" in call.token_ids:  # we compute each different text once: queries first, then passages
        expected: list[list[int]] = []
        for place, side in enumerate(("query_", "passage_")):
            texts = [pair[place] for pair in call.inputs]
            expected += dict(zip(texts, call.token_ids[f"{side}input_ids"], strict=True)).values()
    else:
        expected = call.token_ids["input_ids"]
    assert [seen[place].ids.tolist() for place in sorted(seen)] == expected
    if "token_type_ids" in call.token_ids:
        given = [np.asarray(seen[place].type_ids).tolist() for place in sorted(seen)]
        assert given == call.token_ids["token_type_ids"]


def compare(given: Any, call: Call) -> list[Row]:
    """Check types and what must be exact; the differences of the rest."""
    if call.method == "compute_score" and call.library == "BGEM3FlagModel":
        return _compare_kinds(given, call)
    if call.method == "compute_score":
        return [_compare_scores(given, call)]
    if call.library == "BGEM3FlagModel":
        return _compare_outputs(given, call)
    return [_compare_vectors(given, call, "")]


def _compare_vectors(given: Any, call: Call, name: str) -> Row:
    assert type(given) is np.ndarray
    assert given.dtype == np.float32
    expected = call.expected[name]
    if call.constructor.get("normalize_embeddings", True):
        cosines = (given * expected).sum(axis=-1) / np.linalg.norm(expected, axis=-1) / np.linalg.norm(given, axis=-1)
        assert cosines.min() >= 0.999999
    return _row(call, name, given, expected)


def _compare_scores(given: Any, call: Call) -> Row:
    expected = call.expected[""]
    assert type(given) is list
    for layer in given if expected.ndim == 2 else [given]:
        assert type(layer) is list
        assert {type(score) for score in layer} == {float}
    return _row(call, "", given, expected)


def _compare_kinds(given: Any, call: Call) -> list[Row]:
    assert list(given) == ["colbert", "sparse", "dense", "sparse+dense", "colbert+sparse+dense"]
    for scores in given.values():
        assert type(scores) is (float if call.is_bare else list)
        assert isinstance(scores, float) or {type(score) for score in scores} == {float}
    return [_row(call, name, scores, call.expected[name]) for name, scores in given.items()]


def _compare_outputs(given: Any, call: Call) -> list[Row]:
    assert list(given) == ["dense_vecs", "lexical_weights", "colbert_vecs"]
    rows = []
    assert (given["dense_vecs"] is None) == ("dense" not in call.expected)
    if given["dense_vecs"] is not None:
        rows.append(_compare_vectors(given["dense_vecs"], call, "dense"))
    assert (given["lexical_weights"] is None) == (call.expected_sparse is None)
    if call.expected_sparse is not None:
        rows.append(_compare_lexical(given["lexical_weights"], call))
    assert (given["colbert_vecs"] is None) == ("colbert_values" not in call.expected)
    if given["colbert_vecs"] is not None:
        texts = [given["colbert_vecs"]] if call.is_bare else given["colbert_vecs"]
        assert {type(text) for text in texts} == {np.ndarray}
        assert np.cumsum([0, *map(len, texts)]).tolist() == call.expected["colbert_offsets"].tolist()
        rows.append(_row(call, "colbert", np.concatenate(texts), call.expected["colbert_values"]))
    return rows


def _compare_lexical(given: Any, call: Call) -> Row:
    texts = [given] if call.is_bare else given
    found, expected = [], []
    for weights, wanted in zip(texts, call.expected_sparse or [], strict=True):
        assert isinstance(weights, dict)
        assert {type(weight) for weight in weights.values()} <= {np.float32}
        assert set(weights) == {str(token) for token in wanted}
        found += list(weights.values())
        expected += [wanted[int(token)] for token in weights]
    return _row(call, "lexical", found, np.array(expected, np.float32))


def _row(call: Call, name: str, given: Any, expected: np.ndarray) -> Row:
    share = difference(given, expected)
    return str(call), name, float(np.abs(np.asarray(given, np.float64) - expected).max(initial=0)), share
