"""Stands in for an engine: answers follow from the texts alone, need no model and take no time.

A text's vector is the same in every process and version. Equal texts have equal vectors, different texts different ones, and
texts that share words are nearer to each other than texts that share none: a search finds what contains the words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np

from embedq.core import vectors
from embedq.core.codec import pack, unpack
from embedq.core.errors import InvalidInput, InvalidSettings, UnknownModel
from embedq.core.options import EmbedOptions, RerankOptions, check_text, check_texts
from embedq.core.results import Embeddings, Ranking, Sparse, Timings

#: Alias where the test names none.
ALIAS = "fake"

#: How many ids of tokens there are.
_VOCABULARY = 30_000

_WORD = re.compile(r"\w+")

_Result = TypeVar("_Result", Embeddings, Ranking)

_NO_TIME = Timings(waited_s=0.0, encoded_s=0.0, computed_s=0.0, batch_size=1, num_tokens=0)


class FakeEngine:
    """Embeds and reranks as an engine does, with the same options and the same errors; any thread may call."""

    def __init__(self, dimensions: int | Mapping[str, int] = 384) -> None:
        """`dimensions` of the vectors, of every alias or by alias; the first alias is the default.

        InvalidSettings for a width below 2: scaled to length 1, such vectors could not differ.
        """
        self.is_any_model = not isinstance(dimensions, Mapping)
        self.dimensions = dict(dimensions) if isinstance(dimensions, Mapping) else {ALIAS: dimensions}
        for alias, width in self.dimensions.items():
            if type(width) is not int or width < 2:
                raise InvalidSettings(f"dimensions of {alias!r:.70} must be a whole number from 2; given {width!r:.40}")

    def embed(self, texts: list[str], **given: Any) -> Embeddings:
        """`Embeddings` of `texts`: vectors of length 1, as they arrive from a worker: read-only."""
        texts, chosen = check_texts("texts", texts), EmbedOptions.checked(given)
        alias, width = self._model(chosen.model)
        if chosen.dimensions is not None and chosen.dimensions > width:
            raise InvalidInput(f"dimensions may be up to {width} for model {alias}; given {chosen.dimensions}")
        rows, dense, ranges = _rows(texts, width, chosen.outputs), None, None
        if "dense" in rows:
            pooled = np.array(rows["dense"], np.float32).reshape(len(texts), width)
            dense, ranges = vectors.finish(pooled, chosen.dimensions, chosen.normalize is not False, chosen.dtype)
        timings = _NO_TIME if chosen.timings else None
        return _arrived(Embeddings(dense, rows.get("colbert"), rows.get("sparse"), ranges, alias, timings))

    def rerank(self, query: str, passages: list[str], **given: Any) -> Ranking:
        """The `Ranking` of `passages` by how many words they share with `query`; an equal text is the best."""
        query, passages = check_text("query", query), check_texts("passages", passages)
        chosen = RerankOptions.checked(given)
        alias, width = self._model(chosen.model)
        outputs = ("dense", "sparse", "colbert") if chosen.mode == "weighted" else (chosen.mode or "dense",)
        asked, read = _rows([query] * len(passages), width, outputs), _rows(passages, width, outputs)
        scores = vectors.score(asked, read, chosen.mode or "dense", chosen.weights)
        if chosen.normalize:
            scores = (1 / (1 + np.exp(-scores))).astype(np.float32)
        order = np.argsort(-scores, kind="stable")[: chosen.top_k].astype(np.int32)
        return _arrived(Ranking(scores, order, alias, timings=_NO_TIME if chosen.timings else None))

    def _model(self, asked: str | None) -> tuple[str, int]:
        """(alias, width) of the model that a call means. UnknownModel for an alias that the test did not name."""
        alias, width = next(iter(self.dimensions.items()))
        if asked is None:
            return alias, width
        if self.is_any_model:
            return asked, width
        if asked not in self.dimensions:
            raise UnknownModel(f"unknown model {asked!r:.40}; this fake has {', '.join(self.dimensions)}")
        return asked, self.dimensions[asked]


def _rows(texts: list[str], width: int, outputs: tuple[str, ...]) -> dict[str, list[Any]]:
    """What each output has of each text."""
    of = {"dense": _dense, "sparse": _sparse, "colbert": _colbert}
    return {output: [of[output](text, width) for text in texts] for output in outputs}


def _dense(text: str, width: int) -> np.ndarray:
    """(width,) of length 1: the text's own direction, and those of its words."""
    row = _direction(f"text {text}", width) + sum(_direction(word, width) for word in _words(text))
    scaled: np.ndarray = row / max(float(np.linalg.norm(row)), 1e-6)
    return scaled


def _sparse(text: str, _: int) -> Sparse:
    ids = np.unique(np.array([_number(word) % _VOCABULARY for word in _words(text)], np.int32))
    return Sparse(ids, np.ones(len(ids), np.float32))


def _colbert(text: str, width: int) -> np.ndarray:
    """(num_tokens, width), rows of length 1: one for the text, one for each of its words."""
    return np.stack([_direction(f"text {text}", width), *(_direction(word, width) for word in _words(text))])


def _words(text: str) -> list[str]:
    """The different words of a text, in their order."""
    return list(dict.fromkeys(_WORD.findall(text.lower())))


@lru_cache(maxsize=4096)  # of a corpus most words come again and again
def _direction(word: str, width: int) -> np.ndarray:
    """(width,) float32 of length 1 that follows from the word alone.

    From a hash of any length, and not from NumPy's random numbers, which may change with its version.
    """
    digest = hashlib.shake_256(word.encode()).digest(4 * width)
    row = np.frombuffer(digest, "<u4").astype(np.float64) - (2**31 - 0.5)  # never 0
    return (row / np.linalg.norm(row)).astype(np.float32)


def _number(word: str) -> int:
    return int.from_bytes(hashlib.shake_256(word.encode()).digest(8), "little")


def _arrived(result: _Result) -> _Result:
    """The result as a producer gets it from a worker: code that changes its arrays fails here as it would there."""
    arrived: _Result = unpack(pack(result))
    return arrived
