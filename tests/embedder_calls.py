"""Golden calls of embedders -> calls of ours: what to load a model with, and what to ask it for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from embedq import core
from embedq.core.engine import Engine
from embedq.core.options import EmbedOptions
from embedq.core.results import Embeddings
from embedq.core.settings import Precision
from tests.golden_cases import Call, difference

#: FlagEmbedding's classes -> our families. The directories of two of them would not tell.
_FAMILIES = {"BGEM3FlagModel": "m3", "FlagModel": "encoder", "FlagLLMModel": "decoder", "FlagICLModel": "icl"}

#: FlagEmbedding's own pooling and formats where a constructor names none.
_POOLINGS = {"m3": "cls", "encoder": "cls", "decoder": "last_token", "icl": "last_token"}
_FORMATS = {"decoder": "Instruct: {}\nQuery: {}", "icl": "<instruct>{}\n<query>{}"}

#: Methods -> input types; all others add nothing to a text.
_INPUT_TYPES = {
    "encode_queries": "query",
    "encode_query": "query",
    "encode_corpus": "document",
    "encode_document": "document",
}


@dataclass(frozen=True)
class Ours:
    """A golden call in our words."""

    #: Of `core.load(model=…)`.
    model: dict[str, Any]
    #: Of `engine.embed`.
    options: dict[str, Any]
    #: sentence-transformers cuts vectors that are normalised already: the caller's own slice.
    kept: int | None = None


def translate(call: Call) -> Ours:
    """The options of our own call that stands for `call`."""
    return _of_flag(call) if call.library in _FAMILIES else _of_sentence_transformers(call)


@contextmanager
def load(call: Call, precision: Precision = "float32", **settings: Any) -> Iterator[Engine]:
    """An engine with the model of `call`, on the CPU."""
    with core.load(
        str(call.model), model=translate(call).model, precision=precision, device="cpu", **settings
    ) as engine:
        yield engine


def embed(engine: Engine, call: Call, texts: list[str] | None = None, **more: Any) -> Embeddings:
    """Our result for the texts of `call`, or for others asked for in the same way."""
    ours = translate(call)
    found = engine.embed(call.inputs if texts is None else texts, **(ours.options | more))
    return replace(found, dense=found.dense[:, : ours.kept]) if found.dense is not None else found


def token_ids(engine: Engine, call: Call) -> list[list[int]]:
    """The ids that reach the network for the texts of `call`."""
    model: Any = engine.models["model"]
    encoded = model.encode_texts(call.inputs, EmbedOptions(**translate(call).options))
    return [tokens.ids.tolist() for tokens in encoded]


def differences(found: Embeddings, call: Call) -> dict[str, float]:
    """For each output the largest difference, as a share of what is allowed; see `golden_cases.difference`."""
    outputs = {}
    dense = call.expected.get("dense", call.expected.get(""))
    assert (found.dense is None) == (dense is None)
    if dense is not None:
        assert found.dense is not None
        outputs["dense"] = difference(found.dense, np.atleast_2d(dense))
    assert (found.sparse is None) == (call.expected_sparse is None)
    if found.sparse is not None and call.expected_sparse is not None:
        outputs["sparse"] = _sparse_difference(found, call.expected_sparse)
    assert (found.colbert is None) == ("colbert_values" not in call.expected)
    if found.colbert is not None:
        offsets = np.cumsum([0, *map(len, found.colbert)])
        assert offsets.tolist() == call.expected["colbert_offsets"].tolist()
        outputs["colbert"] = difference(np.concatenate(found.colbert), call.expected["colbert_values"])
    return outputs


def rows_of(call: Call, rows: list[int]) -> Call:
    """`call` with some of its texts only, and what is expected for them; a text may come more than once."""
    expected = {}
    for name, array in call.expected.items():
        if name in ("", "dense"):
            expected[name] = array[rows]
    if "colbert_values" in call.expected:
        values, offsets = call.expected["colbert_values"], call.expected["colbert_offsets"]
        parts = [values[offsets[row] : offsets[row + 1]] for row in rows]
        expected |= {"colbert_values": np.concatenate(parts), "colbert_offsets": np.cumsum([0, *map(len, parts)])}
    sparse = None if call.expected_sparse is None else [call.expected_sparse[row] for row in rows]
    return replace(call, inputs=[call.inputs[row] for row in rows], expected=expected, expected_sparse=sparse)


def _sparse_difference(found: Embeddings, expected: list[dict[int, float]]) -> float:
    assert found.sparse is not None
    worst = 0.0
    for row, weights in zip(found.sparse, expected, strict=True):
        assert row.ids.tolist() == sorted(weights)
        values = np.array([weights[token] for token in sorted(weights)], np.float32)
        worst = max(worst, difference(row.weights, values))
    return worst


def _of_flag(call: Call) -> Ours:
    given, asked = call.constructor, call.kwargs
    family = _FAMILIES[call.library]
    model = {
        "family": family,
        "pooling": given.get("pooling_method", _POOLINGS[family]),
        "normalize": given.get("normalize_embeddings"),
        "query_instruction": given.get("query_instruction_for_retrieval"),
        "query_format": given.get("query_instruction_format", _FORMATS.get(family)),
        "passage_instruction": given.get("passage_instruction_for_retrieval"),
        "passage_format": given.get("passage_instruction_format"),
        "examples": given.get("examples_for_task"),
        "suffix": given.get("suffix"),
    }
    side = "query_max_length" if call.method == "encode_queries" else "passage_max_length"
    options = {
        "input_type": _INPUT_TYPES.get(call.method),
        "max_length": asked.get("max_length", given.get(side)),
        "dimensions": _fitting(given.get("truncate_dim"), call.expected),
        "outputs": _outputs(asked) if family == "m3" else ("dense",),
    }
    return Ours(model, options)


def _outputs(asked: Mapping[str, bool]) -> tuple[str, ...]:
    flags = {
        "dense": ("return_dense", True),
        "sparse": ("return_sparse", False),
        "colbert": ("return_colbert_vecs", False),
    }
    return tuple(name for name, (flag, usual) in flags.items() if asked.get(flag, usual))


def _fitting(dimensions: int | None, expected: Mapping[str, np.ndarray]) -> int | None:
    """FlagEmbedding takes more components than there are for all of them; we refuse them."""
    size = max(array.shape[-1] for name, array in expected.items() if name in ("", "dense")) if expected else 0
    return dimensions if dimensions is None or dimensions <= size else None


def _of_sentence_transformers(call: Call) -> Ours:
    asked = call.kwargs
    does_normalize_again = asked.get("normalize_embeddings", False)
    options = {
        "input_type": asked.get("prompt_name", _INPUT_TYPES.get(call.method)),
        "instruction": asked.get("prompt"),
        "dimensions": asked.get("truncate_dim") if does_normalize_again else None,
    }
    return Ours({}, options, None if does_normalize_again else asked.get("truncate_dim"))
