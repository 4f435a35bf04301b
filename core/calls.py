"""Checks a caller's arguments, and builds the call of one model that encodes its texts and makes its result.

Knows the models and which of them is the default; knows no job, batch or thread. Wrong arguments raise here, before
anything is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, cast

import numpy as np

from embedq.core import vectors
from embedq.core.batching.job import Call
from embedq.core.errors import InvalidInput, InvalidSettings, UnknownModel
from embedq.core.models import Embedder, Model, Reranker
from embedq.core.models.requested_outputs import usual_mode
from embedq.core.options import EmbedOptions, RerankOptions, check_pairs, check_text, check_texts
from embedq.core.results import Embeddings, Ranking
from embedq.core.sequence import Tokens
from embedq.core.settings import Settings

Pairs = list[tuple[str, str]]


class CallBuilder:
    """Builds the calls of one engine."""

    def __init__(self, models: Mapping[str, Model], settings: Settings) -> None:
        self._models = models
        self.default_embed, self.default_rerank = _defaults(models, settings)

    def embed(self, texts: list[str], **given: Any) -> Call:
        """Build a call whose result is `Embeddings` of `texts`; options as in `core.options.EmbedOptions`."""
        texts, chosen = check_texts("texts", texts), EmbedOptions.checked(given)
        model = cast(Embedder, self._model(chosen.model, self.default_embed, "embed"))

        def finish(rows: dict[str, list[Any]]) -> Embeddings:
            normalize = model.spec.normalize if chosen.normalize is None else chosen.normalize
            dense, ranges, colbert = None, None, None
            if "dense" in rows:
                pooled = _stack(rows["dense"], model.spec.dimensions)
                dense, ranges = vectors.finish(pooled, chosen.dimensions, normalize, chosen.dtype)
            if "colbert" in rows:
                colbert = [vectors.finish(row, chosen.dimensions, normalize, "float32")[0] for row in rows["colbert"]]
            sparse = rows.get("sparse")
            spec = model.spec
            return Embeddings(dense, colbert, sparse, ranges, spec.alias, None, spec.revision, model.precision)

        def encode(some: list[str]) -> list[Tokens]:
            return model.encode_texts(some, chosen)

        return Call(model, model.wanted(chosen), texts, encode, finish, chosen.timings, (model.spec.alias, chosen))

    def rerank(self, query: str, passages: list[str], **given: Any) -> Call:
        """Build a call whose result is a `Ranking` of `passages`; options as in `core.options.RerankOptions`.

        A reranker's score is its logit; an embedding model's is the cosine of the two vectors, or what `mode` names.
        With several layers the last one decides the order.
        """
        query, passages = check_text("query", query), check_texts("passages", passages)
        chosen = RerankOptions.checked(given)

        def finish(layers: np.ndarray) -> Ranking:
            order = np.argsort(-layers[-1], kind="stable")[: chosen.top_k].astype(np.int32)
            several = layers if len(layers) > 1 else None
            spec = model.spec
            return Ranking(layers[-1], order, spec.alias, several, None, spec.revision, model.precision)

        call = self._pairs([(query, passage) for passage in passages], chosen, finish)
        model = call.model
        return call

    def score(self, pairs: Pairs, **given: Any) -> Call:
        """Build a call whose result is the scores of (query, passage) pairs; options as `rerank`'s, except `top_k`.

        (num_pairs,) float32 in the order of the pairs; (num_layers, num_pairs) for several layers.
        """
        checked, chosen = check_pairs(pairs), RerankOptions.checked(given)
        return self._pairs(checked, chosen, lambda layers: layers if len(layers) > 1 else layers[0])

    @staticmethod
    def together(calls: list[Call], alike: Call) -> Call:
        """Build one call of several that differ in their texts alone; its result is the list of their results.

        `alike` is a call with the same options, and without a text: there may be no other.
        """
        ends = [*accumulate(call.num_rows for call in calls)]

        def finish(rows: dict[str, list[Any]]) -> list[Any]:
            parts = zip(calls, [0, *ends], ends, strict=False)
            return [
                call.finish({name: values[begin:end] for name, values in rows.items()}) for call, begin, end in parts
            ]

        all_rows = [row for call in calls for row in call.rows]
        return Call(alike.model, alike.wanted, all_rows, alike.encode, finish, encoded_as=alike.encoded_as)

    def _pairs(self, pairs: Pairs, chosen: RerankOptions, finish: Callable[[np.ndarray], Any]) -> Call:
        """Build a call whose `finish` gets (num_layers, num_pairs) float32, layers ascending; usually one layer."""
        model = self._model(chosen.model, self.default_rerank, "rerank")
        if model.spec.is_embedder:
            return _by_embedding(cast(Embedder, model), pairs, chosen, finish)
        reranker, wanted = cast(Reranker, model), model.wanted(chosen)

        def finish_rows(rows: dict[str, list[Any]]) -> Any:
            layers = _stack(rows["score"], max(1, len(wanted.cutoff_layers))).T
            return finish(_scaled(layers, chosen))

        def encode(some: Pairs) -> list[Tokens]:
            return reranker.encode_pairs(some, chosen)

        return Call(model, wanted, pairs, encode, finish_rows, chosen.timings, (model.spec.alias, chosen))

    def _model(self, alias: str | None, default: str | None, kind: str) -> Model:
        chosen = alias or default
        if chosen is None:
            raise UnknownModel(
                f"{kind} needs model=…, because no default model is set for it; this worker serves {', '.join(self._models)}"
            )
        if chosen not in self._models:
            raise UnknownModel(f"unknown model {chosen!r:.40}; this worker serves {', '.join(self._models)}")
        model = self._models[chosen]
        if kind == "embed" and not model.spec.is_embedder:
            raise InvalidInput(f"model {chosen} is a reranker: it cannot embed")
        return model


def _by_embedding(model: Embedder, pairs: Pairs, chosen: RerankOptions, finish: Callable[[np.ndarray], Any]) -> Call:
    """Build a call that scores pairs by the rows of both texts; computes each distinct text once, queries first."""
    as_query = EmbedOptions(
        input_type="query",
        instruction=chosen.query_instruction,
        instruction_format=chosen.query_instruction_format,
        max_length=chosen.query_max_length or chosen.max_length,
    )
    as_passage = EmbedOptions(
        input_type="document",
        instruction=chosen.passage_instruction,
        instruction_format=chosen.passage_instruction_format,
        max_length=chosen.max_length,
    )

    queries, passages = (dict.fromkeys(pair[side] for pair in pairs) for side in (0, 1))
    all_rows = [(True, query) for query in queries] + [(False, passage) for passage in passages]

    def encode(some: list[tuple[bool, str]]) -> list[Tokens]:
        asked, read = ([text for is_query, text in some if is_query == wanted] for wanted in (True, False))
        queries = iter(model.encode_texts(asked, as_query) if asked else [])
        passages = iter(model.encode_texts(read, as_passage) if read else [])
        return [next(queries if is_query else passages) for is_query, _ in some]

    def finish_rows(rows: dict[str, list[Any]]) -> Any:
        if "colbert" in rows:
            rows["colbert"] = [vectors.normalized(row) for row in rows["colbert"]]
        if "dense" in rows and model.spec.normalize and model.spec.similarity != "cosine":
            rows["dense"] = list(vectors.normalized(_stack(rows["dense"], model.spec.dimensions)))
        places = {row: place for place, row in enumerate(all_rows)}
        of_queries, of_passages = (
            {name: [values[places[is_query, pair[side]]] for pair in pairs] for name, values in rows.items()}
            for side, is_query in ((0, True), (1, False))
        )
        mode = chosen.mode or usual_mode(model.outputs)
        scores = vectors.score(of_queries, of_passages, mode, chosen.weights, model.spec.similarity)
        return finish(_scaled(scores[np.newaxis], chosen))

    return Call(model, model.wanted(chosen), all_rows, encode, finish_rows, chosen.timings)


def _scaled(layers: np.ndarray, chosen: RerankOptions) -> np.ndarray:
    """The scores' sigmoid if the call asks for it, otherwise the scores."""
    if chosen.normalize:
        layers = np.exp(-np.logaddexp(0, -layers))  # without overflow for logits below -88
    return np.ascontiguousarray(layers)


def _defaults(models: Mapping[str, Model], settings: Settings) -> tuple[str | None, str | None]:
    """(default alias for embed, for rerank): as set, else the only model that can; None if there are several."""
    embedders = [alias for alias, model in models.items() if model.spec.is_embedder]
    rerankers = [alias for alias, model in models.items() if not model.spec.is_embedder] or embedders
    if settings.default_embed not in (None, "none", *embedders):
        raise InvalidSettings(f"default_embed is {settings.default_embed!r}, a reranker, which cannot embed")
    return _default(settings.default_embed, embedders), _default(settings.default_rerank, rerankers)


def _default(wanted: str | None, candidates: list[str]) -> str | None:
    if wanted is None:
        return candidates[0] if len(candidates) == 1 else None
    return None if wanted == "none" else wanted


def _stack(rows: list[np.ndarray], width: int) -> np.ndarray:
    """(num_rows, width), copied: rows are views of their batches' arrays, which they would keep in memory."""
    # Takes a third of the time of np.stack, which makes a two-dimensional array of each row first.
    return np.concatenate(rows).reshape(len(rows), -1) if rows else np.empty((0, width), np.float32)
